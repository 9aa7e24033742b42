// --- filter, chips, sort ---------------------------------------------------------------------------------------

const hay = new Array(count);
const text = (i) => hay[i] || (hay[i] = ["id", "prompt", "error_code", "error_message", "motion_name", "image", "flags", "review_note"].map((name) => cell(name, i) ?? "")
  .concat(Object.values(extra).map((column) => at(column, i) ?? "")).join("\n").toLowerCase());
const collator = new Intl.Collator(undefined, { numeric: true });
const by = (name, i, missing = -1) => cell(name, i) ?? missing;
const orders = {
  "Taken again first": (a, b) => retaken(b) - retaken(a) || a - b,
  "Manifest order": null,
  "Failed first": (a, b) => failed(b) - failed(a) || a - b,
  "Newest first": (a, b) => by("finished_at", b) - by("finished_at", a) || a - b,
  "Id": (a, b) => collator.compare(cell("id", a), cell("id", b)) || a - b,
  "Most motion": (a, b) => by("motion", b) - by("motion", a) || a - b,
  "Least motion": (a, b) => by("motion", a, 9) - by("motion", b, 9) || a - b,
  "Slowest first": (a, b) => by("animate_s", b) - by("animate_s", a) || a - b,
  "Largest file": (a, b) => by("size_bytes", b) - by("size_bytes", a) || a - b,
};
const columnOf = Object.fromEntries([knobs, extra, columns].flatMap((table) => Object.entries(table).map(([name, column]) => [name.toLowerCase(), column])));
const has = (name) => { for (let i = 0; i < count; i++) if (cell(name, i) != null) return true; return false; };
const numbers = [...Object.keys(judged), "take"].filter(has);
/** The number that the cards are sorted by, or "". */
const chosenNumber = () => ($("sort").value.startsWith("#") ? $("sort").value.slice(1) : "");
let bestFirst = false;

/** The order by a number, worst first; rows without it come last either way. */
function orderBy(name) {
  const sign = ((judged[name] ?? "high") === "high") === bestFirst ? 1 : -1;
  const keys = Float64Array.from({ length: count }, (_, i) => { const value = cell(name, i); return value == null ? Infinity : sign * value; });
  return (a, b) => (keys[a] === keys[b] ? a - b : keys[a] - keys[b]);
}

/** A test of rows for a word such as flicker>0.03; null for any other word. */
function comparison(word) {
  const found = /^([^<>=]+)(>=|<=|>|<|=)(-?\d*\.?\d+)$/.exec(word);
  const column = found && columnOf[found[1]];
  if (!column) return null;
  const limit = Number(found[3]);
  const tests = { ">": (v) => v > limit, "<": (v) => v < limit, ">=": (v) => v >= limit, "<=": (v) => v <= limit, "=": (v) => v === limit };
  return (i) => { const value = at(column, i); return value != null && value !== "" && tests[found[2]](Number(value)); };
}

const codes = new Map();
let numFailed = 0;
for (let i = 0; i < count; i++) if (failed(i)) { numFailed++; const code = cell("error_code", i) || "failed"; codes.set(code, (codes.get(code) || 0) + 1); }
let status = "all", rows = [], drawn = 0;

const states = {
  all: () => true,
  succeeded: (i) => !failed(i),
  failed,
  accepted: (i) => cell("accepted", i) === true,
  unaccepted: (i) => cell("accepted", i) === false,
  retakes: (i) => takeOf(i) > 0,
  again: (i) => retaken(i) && !verdictOf(i),
  approved: (i) => verdictOf(i)?.verdict === APPROVED,
  rejected: (i) => verdictOf(i)?.verdict === REJECTED,
  open: (i) => !failed(i) && !verdictOf(i),
};
const chosen = (i) => (status.startsWith("code:") ? failed(i) && (cell("error_code", i) || "failed") === status.slice(5) : states[status](i));

function chip(value, name, n, className) {
  const button = el("button", { type: "button", className: `chip num ${className || ""}`, onclick() { status = status === value ? "all" : value; apply(); } }, name, el("b", {}, number.format(n)));
  button.dataset.status = value;
  button.setAttribute("aria-pressed", String(value === status));
  return button;
}
function drawChips() {
  const n = Object.fromEntries(Object.entries(states).map(([name, test]) => { let found = 0; for (let i = 0; i < count; i++) found += test(i); return [name, found]; }));
  const reviewed = n.approved + n.rejected + n.again > 0;
  const chips = [chip("all", "All", count)];
  const add = (when, value, name) => { if (when || status === value) chips.push(chip(value, name, n[value])); };
  add(numFailed && numFailed < count, "succeeded", "Succeeded");
  add(numFailed, "failed", "Failed");
  add(n.accepted + n.unaccepted, "accepted", "Accepted");
  add(n.unaccepted, "unaccepted", "Not accepted");
  add(n.retakes, "retakes", "Retakes");
  add(n.again, "again", "To review again");
  add(reviewed, "open", "Not reviewed");
  add(n.approved, "approved", "Approved");
  add(n.rejected, "rejected", "Rejected");
  if (codes.size > 1) for (const [code, found] of [...codes].sort((a, b) => b[1] - a[1])) chips.push(chip(`code:${code}`, code, found, "code"));
  const focused = $("chips").contains(document.activeElement);
  $("chips").replaceChildren(...chips);
  if (focused) chips.find((each) => each.dataset.status === status).focus();
}

function drawSort() {
  const names = Object.keys(orders).filter((name) => name !== "Taken again first" || anyRow(retaken));
  $("sort").append(...names.map((name) => el("option", {}, name)));
  if (!numbers.length) return;
  const group = el("optgroup", { label: "By a number" });
  group.append(...numbers.map((name) => el("option", { value: `#${name}` }, worded(name))));
  $("sort").append(group);
}
function anyRow(test) { for (let i = 0; i < count; i++) if (test(i)) return true; return false; }

function apply() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const tests = words.map(comparison).filter(Boolean), plain = words.filter((word) => !comparison(word));
  const name = chosenNumber();
  $("range").hidden = !name;
  $("direction").textContent = name in judged ? (bestFirst ? "Best first" : "Worst first") : bestFirst ? "Least first" : "Most first";
  for (const [id, mark] of [["least", ">="], ["most", "<="]]) if (name && $(id).value !== "") tests.push(comparison(`${name}${mark}${Number($(id).value)}`));
  rows = [];
  for (let i = 0; i < count; i++) {
    if (!chosen(i) || !tests.every((test) => test(i))) continue;
    if (plain.length) { const t = text(i); if (!plain.every((word) => t.includes(word) || word === cell("seed", i))) continue; }
    rows.push(i);
  }
  const order = name ? orderBy(name) : orders[$("sort").value];
  if (order) rows.sort(order);
  drawChips();
  clear();
  $("shown").textContent = rows.length === count ? `${number.format(count)} ${count === 1 ? "animation" : "animations"}` : `${number.format(rows.length)} of ${number.format(count)}`;
  $("nothing").hidden = rows.length > 0;
  draw();
}

// --- cards are drawn as they are reached; far from the view they give way to empty places of their height ----------

const CHUNK = 36, MOST_CARDS = 612;
let chunks = [];
function clear() {
  near.disconnect(); seen.disconnect(); back.disconnect(); inView.clear();
  for (const chunk of chunks) letGo(chunk);
  $("grid").replaceChildren();
  chunks = [];
  drawn = 0;
}
function letGo(chunk) {
  for (const item of chunk.items) {
    const pane = item.querySelector(".pane.video");
    if (pane) { panes.get(pane)?.drop(); near.unobserve(pane); seen.unobserve(pane); inView.delete(pane); }
  }
}
function draw() {
  if (drawn >= rows.length) return;
  const items = rows.slice(drawn, drawn + CHUNK).map(card);
  drawn = Math.min(rows.length, drawn + CHUNK);
  chunks.push({ items, begin: drawn - items.length, full: true });
  $("grid").append(...items);
  thin(chunks.length - 1);
  // Still in reach after this: the observer only speaks up on a change, so ask again.
  end.unobserve($("more")); end.observe($("more"));
}
/** Empties the chunks that are farthest from this one, so that there are never more than MOST_CARDS cards. */
function thin(here) {
  const full = chunks.filter((chunk) => chunk.full).sort((a, b) => Math.abs(chunks.indexOf(b) - here) - Math.abs(chunks.indexOf(a) - here));
  for (const chunk of full.slice(0, Math.max(0, full.length - MOST_CARDS / CHUNK))) {
    const heights = chunk.items.map((item) => item.offsetHeight);
    letGo(chunk);
    chunk.full = false;
    chunk.items.forEach((item, k) => { item.style.height = `${heights[k]}px`; item.replaceChildren(); });
    for (const item of chunk.items) back.observe(item);
  }
}
const back = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const here = isIntersecting ? chunks.findIndex((chunk) => !chunk.full && chunk.items.includes(target)) : -1;
    if (here < 0) continue;
    const chunk = chunks[here];
    chunk.full = true;
    chunk.items.forEach((item, k) => { back.unobserve(item); item.style.height = ""; item.replaceChildren(...card(rows[chunk.begin + k]).childNodes); });
    thin(here);
  }
}, { rootMargin: "1200px" });
const end = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) draw(); }, { rootMargin: "1200px" });

/** Shows the verdicts on the cards and buttons as they are now; the cards behind a review wait for its end. */
function verdictsChanged() {
  if (!$("review").open) for (const node of document.querySelectorAll(".card[data-row]")) node.querySelector(".reviewed")?.replaceWith(reviewLine(Number(node.dataset.row)));
  drawReviewButtons();
}

let waiting;
$("filter").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, count > 3000 ? 160 : 60); });
for (const id of ["least", "most"]) $(id).addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 160); });
$("sort").addEventListener("change", () => { bestFirst = false; $("least").value = $("most").value = ""; apply(); });
$("direction").addEventListener("click", () => { bestFirst = !bestFirst; apply(); });
$("reset").addEventListener("click", () => { $("filter").value = $("least").value = $("most").value = ""; status = "all"; apply(); $("filter").focus(); });
function setAutoplay(on) {
  autoplay = on;
  $("autoplay").setAttribute("aria-pressed", String(on));
  playInView(on);
}
$("autoplay").addEventListener("click", () => setAutoplay(!autoplay));
still.addEventListener("change", () => setAutoplay(!still.matches));

