"use strict";
(() => {
  const { count, columns, extra, knobs, hints } = JSON.parse(document.getElementById("rows").textContent);
  const $ = (id) => document.getElementById(id);
  // A column is a plain list, or its distinct values and an index into them.
  const at = (column, i) => (column.v ? column.v[i] : column.d[column.i[i]]);
  const cell = (name, i) => (columns[name] ? at(columns[name], i) : null);
  const number = new Intl.NumberFormat("en");
  const seconds = (s) => (s == null ? null : s < 10 ? `${s.toFixed(2)} s` : s < 120 ? `${s.toFixed(1)} s` : `${(s / 60).toFixed(1)} min`);
  const bytes = (n) => (n == null ? null : n < 1e6 ? `${(n / 1e3).toFixed(0)} kB` : `${(n / 1e6).toFixed(1)} MB`);
  const failed = (i) => cell("status", i) !== "succeeded";
  const label = (i) => cell("id", i) + (cell("video_index", i) ? ` (video ${cell("video_index", i)})` : "");
  const JUDGED = ["motion", "likeness", "likeness_min", "likeness_part", "flicker", "sharpness", "colour_shift", "stillness", "closure", "subject_similarity", "prompt_similarity"];
  const flags = (i) => cell("flags", i)?.replaceAll("_", " ").replaceAll(",", ", ");
  const motion = (i) => {
    const scale = cell("motion_scale", i);
    return scale == null ? null : `${scale} · ${cell("motion_name", i)}`;
  };

  function el(tag, properties, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child != null));
    return node;
  }

  // --- media: loaded near the view, played in it, let go of far from it ------------------------------------------

  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let autoplay = !still.matches;
  const panes = new WeakMap();

  function videoPane(i) {
    const source = cell("video", i), poster = cell("poster", i), thumbnail = cell("thumbnail", i);
    const pane = el("div", { className: "pane video" });
    const note = () => pane.replaceChildren(el("p", {}, "This file cannot be shown here."));
    const fallback = () => {
      pane.dataset.state = "fallback";
      if (thumbnail) pane.replaceChildren(el("img", { alt: "", src: thumbnail, onerror: note }), el("span", { className: "tag" }, "Preview"));
      else note();
    };
    if (!source) return (note(), pane);
    const tag = el("span", { className: "tag" }, "Video");
    const alt = `Animation of ${label(i)}`;
    let control;
    if (/\.(gif|webp)$/.test(source)) {
      const image = el("img", { alt, decoding: "async", onerror: fallback });
      if (poster) image.src = poster;
      pane.append(image, tag);
      control = {
        load() {},
        play() { if (image.dataset.moving !== "1") { image.dataset.moving = "1"; image.src = source; } },
        pause() { if (poster && image.dataset.moving === "1") { image.dataset.moving = "0"; image.src = poster; } },
        drop() { this.pause(); },
      };
    } else {
      const video = el("video", { muted: true, loop: true, playsInline: true, preload: "none", "aria-label": alt, tabIndex: -1 });
      video.setAttribute("muted", "");
      if (poster) video.poster = poster;
      video.addEventListener("error", () => { if (video.getAttribute("src")) fallback(); });
      pane.append(video, tag);
      control = {
        load() { if (!video.getAttribute("src")) { video.src = source; video.preload = "metadata"; } },
        play() { this.load(); video.play().catch(() => {}); },
        pause() { video.pause(); },
        drop() { if (video.getAttribute("src")) { video.pause(); video.removeAttribute("src"); video.preload = "none"; video.load(); } },
      };
    }
    panes.set(pane, control);
    return pane;
  }

  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const control = panes.get(target);
      if (isIntersecting) control.load(); else control.drop();
    }
  }, { rootMargin: "300px" });
  const inView = new Set();
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) inView.add(target); else inView.delete(target);
      if (isIntersecting && autoplay && !$("sheet").open) panes.get(target).play();
      else panes.get(target).pause();
    }
  }, { threshold: 0.6 });
  const playInView = (on) => { for (const pane of inView) on ? panes.get(pane).play() : panes.get(pane).pause(); };

  // --- cards -----------------------------------------------------------------------------------------------------

  function originalPane(i) {
    const poster = cell("poster", i);
    const pane = el("div", { className: "pane" });
    if (poster) pane.append(el("img", { loading: "lazy", decoding: "async", alt: `Original picture of ${label(i)}`, src: poster,
      onerror() { this.replaceWith(el("p", {}, "Its thumbnail is not there.")); } }), el("span", { className: "tag" }, "Original"));
    else pane.append(el("p", {}, "No thumbnail"));
    return pane;
  }

  function whatToDo(i) {
    const code = cell("error_code", i);
    return el("p", { className: "todo" }, cell("retryable", i) ? "May pass when tried again: " : "Mend the input, then: ", el("code", {}, `--retry ${code}`));
  }

  function card(i) {
    const body = el("div", { className: "body" });
    const prompt = cell("prompt", i);
    if (prompt) body.append(el("p", { className: "prompt", title: prompt }, prompt));
    const facts = el("p", { className: "facts num" });
    const add = (text, className) => text && facts.append(el("span", { className: className || "" }, text));
    add(motion(i), "badge");
    add(flags(i), "badge");
    if (cell("width", i)) add(`${cell("width", i)} × ${cell("height", i)}`);
    if (cell("num_frames", i)) add(`${cell("num_frames", i)} frames, ${cell("fps", i)}/s`);
    add(`seed ${cell("seed", i)}`);
    body.append(facts, el("div", { className: "foot" }, el("span", { className: "id", title: label(i) }, label(i)),
      el("span", { className: "num" }, failed(i) ? `${cell("attempts", i)} ${cell("attempts", i) === 1 ? "attempt" : "attempts"}` : seconds(cell("animate_s", i)) || "")));
    const item = el("article", { className: failed(i) ? "card failed" : "card" });
    item.dataset.row = i;
    const open = el("button", { className: "open", type: "button", "aria-label": `${failed(i) ? "Failed: " : ""}${label(i)}. Open details`, onclick: () => show(i) });
    if (failed(i)) {
      const code = cell("error_code", i);
      item.append(el("div", { className: "fault" }, el("span", { className: "code" }, code || "failed"), el("strong", {}, hints[code] || "This row failed."),
        el("p", { className: "why" }, cell("error_message", i) || ""), whatToDo(i)));
    } else {
      const pane = videoPane(i), control = panes.get(pane);
      item.append(el("div", { className: "media" }, originalPane(i), pane));
      if (control) {
        near.observe(pane);
        seen.observe(pane);
        const start = () => control.play(), stop = () => { if (!autoplay) control.pause(); };
        item.addEventListener("pointerenter", start);
        item.addEventListener("pointerleave", stop);
        open.addEventListener("focus", start);
        open.addEventListener("blur", stop);
      }
    }
    item.append(body, open);
    return el("li", {}, item);
  }

  // --- filter, chips, sort ---------------------------------------------------------------------------------------

  const hay = new Array(count);
  const text = (i) => hay[i] || (hay[i] = ["id", "prompt", "error_code", "error_message", "motion_name", "image", "flags"].map((name) => cell(name, i) ?? "")
    .concat(Object.values(extra).map((column) => at(column, i) ?? "")).join("\n").toLowerCase());
  const orders = {
    "Manifest order": null,
    "Failed first": (a, b) => failed(b) - failed(a) || a - b,
    "Newest first": (a, b) => by("finished_at", b) - by("finished_at", a) || a - b,
    "Id": (a, b) => collator.compare(cell("id", a), cell("id", b)) || a - b,
    "Most motion": (a, b) => by("motion", b) - by("motion", a) || a - b,
    "Least motion": (a, b) => by("motion", a, 9) - by("motion", b, 9) || a - b,
    "Slowest first": (a, b) => by("animate_s", b) - by("animate_s", a) || a - b,
    "Largest file": (a, b) => by("size_bytes", b) - by("size_bytes", a) || a - b,
  };
  const collator = new Intl.Collator(undefined, { numeric: true });
  const by = (name, i, missing = -1) => cell(name, i) ?? missing;
  const codes = new Map();
  let numFailed = 0;
  for (let i = 0; i < count; i++) if (failed(i)) { numFailed++; const code = cell("error_code", i) || "failed"; codes.set(code, (codes.get(code) || 0) + 1); }
  let status = "all", rows = [], drawn = 0;

  function chip(value, name, n, className) {
    const button = el("button", { type: "button", className: `chip num ${className || ""}`, onclick() { status = status === value ? "all" : value; apply(); } }, name, el("b", {}, number.format(n)));
    button.dataset.status = value;
    return button;
  }
  $("chips").append(chip("all", "All", count));
  if (numFailed && numFailed < count) $("chips").append(chip("succeeded", "Succeeded", count - numFailed));
  if (numFailed) $("chips").append(chip("failed", "Failed", numFailed));
  if (codes.size > 1) for (const [code, n] of [...codes].sort((a, b) => b[1] - a[1])) $("chips").append(chip(`code:${code}`, code, n, "code"));
  for (const name of Object.keys(orders)) $("sort").append(el("option", {}, name));

  function apply() {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    rows = [];
    for (let i = 0; i < count; i++) {
      if (status === "succeeded" && failed(i)) continue;
      if (status === "failed" && !failed(i)) continue;
      if (status.startsWith("code:") && !(failed(i) && (cell("error_code", i) || "failed") === status.slice(5))) continue;
      if (words.length) { const t = text(i); if (!words.every((word) => t.includes(word) || word === cell("seed", i))) continue; }
      rows.push(i);
    }
    const order = orders[$("sort").value];
    if (order) rows.sort(order);
    for (const button of $("chips").children) button.setAttribute("aria-pressed", String(button.dataset.status === status));
    near.disconnect(); seen.disconnect(); inView.clear();
    for (const pane of $("grid").querySelectorAll(".pane.video")) panes.get(pane)?.drop();
    $("grid").replaceChildren();
    drawn = 0;
    $("shown").textContent = rows.length === count ? `${number.format(count)} ${count === 1 ? "animation" : "animations"}` : `${number.format(rows.length)} of ${number.format(count)}`;
    $("nothing").hidden = rows.length > 0;
    draw();
  }

  const CHUNK = 36;
  function draw() {
    if (drawn >= rows.length) return;
    const part = document.createDocumentFragment();
    for (const i of rows.slice(drawn, drawn + CHUNK)) part.append(card(i));
    drawn = Math.min(rows.length, drawn + CHUNK);
    $("grid").append(part);
    // Still in reach after this: the observer only speaks up on a change, so ask again.
    end.unobserve($("more")); end.observe($("more"));
  }
  const end = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) draw(); }, { rootMargin: "1200px" });

  let waiting;
  $("filter").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, count > 3000 ? 160 : 60); });
  $("sort").addEventListener("change", apply);
  $("reset").addEventListener("click", () => { $("filter").value = ""; status = "all"; apply(); $("filter").focus(); });
  function setAutoplay(on) {
    autoplay = on;
    $("autoplay").setAttribute("aria-pressed", String(on));
    playInView(on);
  }
  $("autoplay").addEventListener("click", () => setAutoplay(!autoplay));
  still.addEventListener("change", () => setAutoplay(!still.matches));

  // --- the sheet with everything about one row -------------------------------------------------------------------

  let open = -1, opener = null;
  const group = (title, pairs) => {
    const list = el("dl", { className: "num" });
    for (const [name, value, copy] of pairs) {
      if (value == null || value === "") continue;
      const shown = el("dd", copy ? { className: "mono" } : {}, String(value));
      if (copy && navigator.clipboard) shown.append(el("button", { type: "button", className: "copy", "aria-label": `Copy ${name}`,
        onclick() { navigator.clipboard.writeText(String(value)).then(() => { this.textContent = "Copied"; }, () => { this.textContent = "Not allowed"; }); } }, "Copy"));
      list.append(el("dt", {}, name), shown);
    }
    return list.children.length ? el("section", {}, el("h3", {}, title), list) : null;
  };

  function show(i) {
    if (!$("sheet").open) opener = document.activeElement;
    open = i;
    const place = rows.indexOf(i);
    $("sheet-id").textContent = label(i);
    $("previous").disabled = place <= 0;
    $("next").disabled = place < 0 || place >= rows.length - 1;
    const body = $("sheet-body"), sheet = el("div", { className: "sheet" });
    if (failed(i)) {
      const code = cell("error_code", i);
      sheet.append(el("p", {}, el("strong", {}, hints[code] || "This row failed.")), el("p", { className: "why" }, cell("error_message", i) || code), whatToDo(i));
    }
    if (cell("prompt", i)) sheet.append(el("p", {}, cell("prompt", i)));
    const size = cell("width", i) ? `${cell("width", i)} × ${cell("height", i)} px` : null;
    const when = cell("finished_at", i);
    sheet.append(el("div", { className: "groups" },
      group("Animation", [["Motion scale", motion(i)], ["Flags", flags(i)], ["Seed", cell("seed", i), true], ["Size", size],
        ["Length", cell("num_frames", i) ? `${cell("num_frames", i)} frames at ${cell("fps", i)}/s, ${seconds(cell("duration_s", i)) || ""}` : null],
        ["File", bytes(cell("size_bytes", i))], ["Original", cell("original_width", i) ? `${cell("original_width", i)} × ${cell("original_height", i)} px` : null], ["Model", cell("model", i)]]),
      group("Judgement", JUDGED.map((name) => [name.replaceAll("_", " "), cell(name, i)?.toFixed(4)])),
      group("Settings", Object.entries(knobs).map(([name, column]) => [name, at(column, i)])),
      group("Run", [["Status", cell("status", i)], ["Error code", cell("error_code", i)], ["Attempts", cell("attempts", i)], ["Fetch", seconds(cell("fetch_s", i))], ["Animate", seconds(cell("animate_s", i))],
        ["Publish", seconds(cell("publish_s", i))], ["GPU", seconds(cell("gpu_s", i))], ["Finished", when ? new Date(when * 1000).toLocaleString() : null], ["Worker", cell("worker", i)], ["Run", cell("run_id", i)]]),
      group("Names", [["Id", cell("id", i), true], ["Image", cell("image", i)], ["Work key", cell("work_key", i), true]]),
      group("Manifest columns", Object.entries(extra).map(([name, column]) => [name, at(column, i)]))));
    const source = cell("video", i);
    if (!failed(i) && source) sheet.append(el("div", { className: "links" }, el("a", { href: source, target: "_blank", rel: "noopener" }, "Open the video"), el("a", { href: source, download: "" }, "Save it")));
    const parts = [];
    if (!failed(i)) {
      const pane = videoPane(i), video = pane.querySelector("video");
      if (video) { video.controls = true; video.tabIndex = 0; }
      parts.push(el("div", { className: "large" }, originalPane(i), pane));
      panes.get(pane)?.play();
    }
    body.replaceChildren(...parts, sheet);
    body.scrollTop = 0;
    if (!$("sheet").open) { playInView(false); $("sheet").showModal(); body.focus(); }
  }
  const step = (by) => { const next = rows[rows.indexOf(open) + by]; if (open >= 0 && next !== undefined) show(next); };
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => $("sheet").close());
  $("sheet").addEventListener("click", (event) => { if (event.target === $("sheet")) $("sheet").close(); });
  $("sheet").addEventListener("close", () => {
    $("sheet-body").replaceChildren();
    open = -1;
    const last = opener;
    opener = null;
    if (last && last.isConnected) last.focus({ preventScroll: true });
    playInView(autoplay);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA|VIDEO)$/.test(document.activeElement?.tagName || "");
    if ($("sheet").open) {
      if (event.key === "ArrowLeft" && !typing) step(-1);
      if (event.key === "ArrowRight" && !typing) step(1);
    } else if (event.key === "/" && !typing) { event.preventDefault(); $("filter").focus(); }
    else if (event.key === "Escape" && document.activeElement === $("filter") && $("filter").value) { $("filter").value = ""; apply(); }
  });

  $("bar").hidden = false;
  setAutoplay(autoplay);
  apply();
})();
