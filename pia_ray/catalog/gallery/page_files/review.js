// --- review: one video after the other, full screen, with a verdict on each -------------------------------------

let queue = [], place = 0, past = [], ahead = null;

/** The rows to review: of those shown the ones without a verdict, replaced ones first; if all have one, all. */
function queueOf(first) {
  const made = rows.filter((i) => !failed(i));
  const open = made.filter((i) => !verdictOf(i) || i === first);
  const chosenRows = open.length ? open : made;
  return [...chosenRows.filter((i) => retaken(i) && !verdictOf(i)), ...chosenRows.filter((i) => !(retaken(i) && !verdictOf(i)))];
}

function startReview(first) {
  queue = queueOf(first);
  if (!queue.length) return;
  place = Math.max(0, queue.indexOf(first));
  past = [];
  playInView(false);
  $("review").showModal();
  $("review").focus();
  drawReview();
}

function progressText() {
  let approved = 0, rejected = 0, all = 0;
  for (const i of rows) {
    if (failed(i)) continue;
    all++;
    const found = verdictOf(i)?.verdict;
    approved += found === APPROVED;
    rejected += found === REJECTED;
  }
  return { all, done: approved + rejected, text: `${number.format(approved + rejected)} of ${number.format(all)}; ${number.format(approved)} approved, ${number.format(rejected)} rejected` };
}

function drawReviewButtons() {
  const fresh = news().length, { all, done, text } = progressText();
  $("start-review").disabled = !rows.some((i) => !failed(i));
  for (const button of document.querySelectorAll(".save-review")) {
    button.hidden = !fresh;
    button.replaceChildren("Save", el("span", { className: "word" }, " review.csv"), ` (${number.format(fresh)})`);
  }
  if (!$("review").open) return;
  $("review-progress").textContent = text;
  $("review-bar").style.width = `${all ? (100 * done) / all : 0}%`;
}

function largePane(i) {
  const pane = videoPane(i), video = pane.querySelector("video");
  if (video) { video.preload = "auto"; video.src = cell("video", i); }
  return pane;
}

function drawReview() {
  const i = queue[place], over = i === undefined;
  $("review-stage").hidden = $("review-sheet").hidden = over;
  $("review-end").hidden = !over;
  for (const id of ["review-approve", "review-reject", "review-next", "review-note"]) $(id).disabled = over;
  $("review-undo").disabled = !past.length;
  $("review-previous").disabled = place <= 0;
  drawReviewButtons();
  if (over) {
    $("review-stage").replaceChildren();
    $("review-end-text").textContent = keeps ? "Every video of this list has been seen." : "Every video of this list has been seen. This browser keeps nothing: save the file before you close the page.";
    return;
  }
  const pane = ahead?.i === i ? ahead.pane : largePane(i);
  ahead = null;
  $("review-stage").replaceChildren(originalPane(i), pane);
  panes.get(pane)?.play();
  const found = verdictOf(i), sheet = [];
  const title = el("p", { className: "review-title" }, el("span", { className: "mono" }, label(i)));
  const add = (text, kind) => title.append(el("span", { className: `badge ${kind}` }, text));
  if (found) add(found.verdict === APPROVED ? "✓ approved" : "✕ rejected", found.verdict === APPROVED ? "good" : "bad");
  if (cell("take", i)) add(`take ${cell("take", i)}`, "");
  if (cell("accepted", i) === false) add("misses its bounds", "bad");
  if (flags(i)) add(flags(i), "");
  sheet.push(title);
  if (retaken(i)) sheet.push(el("p", { className: "earlier" }, el("b", {}, "↻ Taken again. "), cell("review_note", i) ? `Rejected before: ${cell("review_note", i)}` : "Rejected before, without a note."));
  if (cell("prompt", i)) sheet.push(el("p", { className: "prompt" }, cell("prompt", i)));
  const values = numbersOf(i);
  if (values) sheet.push(values);
  $("review-sheet").replaceChildren(...sheet);
  $("review-sheet").scrollTop = 0;
  $("review-note").value = found?.note ?? "";
  $("review-place").textContent = `${number.format(place + 1)} / ${number.format(queue.length)}`;
  const following = queue[place + 1];
  if (following !== undefined) ahead = { i: following, pane: largePane(following) };
}

function decideOn(verdict) {
  const i = queue[place];
  if (i === undefined) return;
  past.push([i, own.get(i) ?? null, place]);
  judge(i, { verdict, note: $("review-note").value.trim() });
  move(1);
}
function move(by) {
  place = Math.min(queue.length, Math.max(0, place + by));
  if (document.activeElement === $("review-note")) $("review-note").blur();
  drawReview();
}
function undo() {
  const last = past.pop();
  if (!last) return;
  judge(last[0], last[1]);
  place = last[2];
  drawReview();
}

$("start-review").addEventListener("click", () => startReview());
$("review-approve").addEventListener("click", () => decideOn(APPROVED));
$("review-reject").addEventListener("click", () => decideOn(REJECTED));
$("review-undo").addEventListener("click", undo);
$("review-next").addEventListener("click", () => move(1));
$("review-previous").addEventListener("click", () => move(-1));
$("review-close").addEventListener("click", () => $("review").close());
$("review-done").addEventListener("click", () => $("review").close());
$("review").addEventListener("close", () => {
  ahead = null;
  $("review-stage").replaceChildren();
  apply();
  playInView(autoplay);
  $("start-review").focus({ preventScroll: true });
});
// A note that is written after the verdict belongs to it.
$("review-note").addEventListener("change", () => {
  const i = queue[place], found = i === undefined ? null : verdictOf(i);
  if (found) { judge(i, { verdict: found.verdict, note: $("review-note").value.trim() }); verdictsChanged(); }
});
for (const button of document.querySelectorAll(".save-review")) button.addEventListener("click", saveReview);
for (const button of document.querySelectorAll(".load-review")) button.addEventListener("click", () => $("review-file").click());
$("review-file").addEventListener("change", async () => {
  const file = $("review-file").files[0];
  $("review-file").value = "";
  if (!file) return;
  const said = loadReview(await file.text());
  apply();
  $("shown").textContent = said;
  if ($("review").open) { $("review-said").textContent = said; drawReview(); }
});

const reviewKeys = {
  a: () => decideOn(APPROVED), r: () => decideOn(REJECTED), u: undo,
  ArrowRight: () => move(1), " ": () => move(1), ArrowLeft: () => move(-1),
  n: () => $("review-note").focus(), s: saveReview,
};
document.addEventListener("keydown", (event) => {
  if (!$("review").open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.activeElement === $("review-note")) {
    if (event.key === "Enter" || event.key === "Escape") { event.preventDefault(); $("review-note").blur(); $("review").focus(); }
    return;
  }
  if (event.key === " " && document.activeElement?.tagName === "BUTTON") return;
  const action = reviewKeys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action) { event.preventDefault(); action(); }
});

