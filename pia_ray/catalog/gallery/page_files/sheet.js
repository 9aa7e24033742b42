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
    group("Judgement", [...Object.keys(judged).map((name) => [worded(name), cell(name, i)?.toFixed(4)]), ["accepted", cell("accepted", i)], ["take", cell("take", i)]]),
    group("Review", [["Verdict", verdictOf(i)?.verdict ?? (retaken(i) ? "none since it was taken again" : null)], ["Note", verdictOf(i)?.note],
      ["Earlier note", retaken(i) ? cell("review_note", i) || "rejected without a note" : null]]),
    group("Settings", Object.entries(knobs).map(([name, column]) => [name, at(column, i)])),
    group("Run", [["Status", cell("status", i)], ["Error code", cell("error_code", i)], ["Attempts", cell("attempts", i)], ["Fetch", seconds(cell("fetch_s", i))], ["Animate", seconds(cell("animate_s", i))],
      ["Publish", seconds(cell("publish_s", i))], ["GPU", seconds(cell("gpu_s", i))], ["Finished", when ? new Date(when * 1000).toLocaleString() : null], ["Worker", cell("worker", i)], ["Run", cell("run_id", i)]]),
    group("Names", [["Id", cell("id", i), true], ["Image", cell("image", i)], ["Work key", cell("work_key", i), true]]),
    group("Manifest columns", Object.entries(extra).map(([name, column]) => [name, at(column, i)]))));
  const source = cell("video", i);
  if (!failed(i) && source) sheet.append(el("div", { className: "links" }, el("button", { type: "button", className: "plain", onclick() { $("sheet").close(); startReview(i); } }, "Review from here"), el("a", { href: source, target: "_blank", rel: "noopener" }, "Open the video"), el("a", { href: source, download: "" }, "Save it")));
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
  if ($("review").open) return;
  const typing = /^(INPUT|SELECT|TEXTAREA|VIDEO)$/.test(document.activeElement?.tagName || "");
  if ($("sheet").open) {
    if (event.key === "ArrowLeft" && !typing) step(-1);
    if (event.key === "ArrowRight" && !typing) step(1);
  } else if (event.key === "/" && !typing) { event.preventDefault(); $("filter").focus(); }
  else if (event.key === "Escape" && document.activeElement === $("filter") && $("filter").value) { $("filter").value = ""; apply(); }
});
