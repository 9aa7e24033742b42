// --- media: loaded near the view, played in it, let go of far from it ------------------------------------------

const still = matchMedia("(prefers-reduced-motion: reduce)");
let autoplay = !still.matches;
const panes = new WeakMap();

function videoPane(i) {
  const source = cell("video", i), poster = cell("still", i) || cell("poster", i), thumbnail = cell("thumbnail", i);
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
    if (isIntersecting && autoplay && !$("sheet").open && !$("review").open) panes.get(target).play();
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

/** The numbers of a video, that by which the cards are sorted marked; null where it has none. */
function numbersOf(i) {
  const list = el("dl", { className: "numbers num" });
  for (const name of Object.keys(judged)) {
    const value = cell(name, i);
    if (value == null) continue;
    list.append(el("div", { className: name === chosenNumber() ? "chosen" : "" }, el("dt", {}, worded(name)), el("dd", {}, shortly(value))));
  }
  return list.children.length ? list : null;
}

/** The verdict on a video, and the note of a rejected one that it replaces. */
function reviewLine(i) {
  const line = el("p", { className: "reviewed" }), found = verdictOf(i);
  if (found) line.append(el("span", { className: `badge ${found.verdict === APPROVED ? "good" : "bad"}` }, found.verdict === APPROVED ? "✓ approved" : "✕ rejected"), found.note ? ` ${found.note}` : "");
  else if (retaken(i)) line.append(el("span", { className: "badge warn" }, "↻ taken again"), ` ${cell("review_note", i) || "rejected before, without a note"}`);
  line.hidden = !line.childNodes.length;
  return line;
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
  add(cell("take", i) ? `take ${cell("take", i)}` : null);
  add({ true: "accepted", false: "misses its bounds" }[cell("accepted", i)], cell("accepted", i) ? "badge good" : "badge bad");
  const numbers = numbersOf(i);
  body.append(reviewLine(i), facts, ...(numbers ? [numbers] : []), el("div", { className: "foot" }, el("span", { className: "id", title: label(i) }, label(i)),
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
