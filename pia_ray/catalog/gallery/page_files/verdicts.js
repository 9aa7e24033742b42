// --- verdicts: of the ledger, and of this browser, which keeps its own until they go out as review.csv ----------

const APPROVED = "approved", REJECTED = "rejected";
const takeOf = (i) => cell("take", i) ?? 0;
const slot = (i) => `pia-ray:${output}:${cell("work_key", i)}:${takeOf(i)}`;
const unsaved = new Set(); // what this browser refused to keep
let keeps = true;

/** The ledger's verdict on the video that is there, or null. */
const recorded = (i) => (cell("review", i) && cell("review_take", i) === takeOf(i) ? { verdict: cell("review", i), note: cell("review_note", i) || "" } : null);
/** Whether the video replaces one that was rejected. */
const retaken = (i) => !failed(i) && cell("review", i) === REJECTED && cell("review_take", i) !== takeOf(i);

function stored(text) {
  try {
    const [verdict, note] = JSON.parse(text);
    return verdict === APPROVED || verdict === REJECTED ? { verdict, note: String(note ?? "") } : null;
  } catch { return null; }
}

const own = new Map(); // row to verdict, of this browser
const rowOf = new Map();
for (let i = 0; i < count; i++) rowOf.set(slot(i), i);
try {
  for (const [name, text] of Object.entries(localStorage)) {
    const i = rowOf.get(name), found = i === undefined ? null : stored(text);
    if (found) own.set(i, found);
  }
} catch { keeps = false; }

const verdictOf = (i) => own.get(i) ?? recorded(i);
const same = (a, b) => a?.verdict === b?.verdict && (a?.note || "") === (b?.note || "");
/** The rows whose verdict the ledger does not have yet. */
const news = () => [...own.keys()].filter((i) => !same(own.get(i), recorded(i))).sort((a, b) => a - b);

/** Keeps this browser's verdict on a row; null takes it back. The cards are drawn anew by `verdictsChanged`. */
function judge(i, verdict) {
  if (verdict) own.set(i, verdict); else own.delete(i);
  try {
    if (verdict) localStorage.setItem(slot(i), JSON.stringify([verdict.verdict, verdict.note]));
    else localStorage.removeItem(slot(i));
  } catch { keeps = false; unsaved.add(i); }
}
addEventListener("storage", (event) => { // another tab of the same page
  const i = rowOf.get(event.key);
  if (i === undefined) return;
  const found = stored(event.newValue);
  if (found) own.set(i, found); else own.delete(i);
  verdictsChanged();
});
addEventListener("beforeunload", (event) => { if (unsaved.size) event.preventDefault(); });

// --- review.csv ---------------------------------------------------------------------------------------------------

const quoted = (value) => `"${String(value).replaceAll('"', '""')}"`;
function reviewCsv() {
  const lines = [["id", "video_index", "verdict", "note", "work_key", "take"].join(",")];
  for (const i of news()) {
    const { verdict, note } = own.get(i);
    lines.push([quoted(cell("id", i)), cell("video_index", i) ?? 0, verdict, quoted(note), cell("work_key", i), takeOf(i)].join(","));
  }
  return lines.join("\r\n") + "\r\n";
}

function saveReview() {
  const url = URL.createObjectURL(new Blob([reviewCsv()], { type: "text/csv;charset=utf-8" }));
  const link = el("a", { href: url, download: "review.csv" });
  document.body.append(link);
  link.click();
  link.remove();
  unsaved.clear();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

/** The records of a CSV text; cells in quotes may hold commas, quotes and line ends. */
function parseCsv(text) {
  const head = text.split("\n", 1)[0];
  const mark = [",", ";", "\t"].reduce((best, each) => (head.split(each).length > head.split(best).length ? each : best));
  const records = [[]];
  let at = text.charCodeAt(0) === 0xfeff ? 1 : 0;
  while (at < text.length) {
    let value = "";
    if (text[at] === '"') {
      for (at++; at < text.length; at++) {
        if (text[at] !== '"') value += text[at];
        else if (text[at + 1] === '"') { value += '"'; at++; }
        else { at++; break; }
      }
    }
    while (at < text.length && text[at] !== mark && text[at] !== "\n") value += text[at++];
    records.at(-1).push(value.replace(/\r$/, ""));
    if (text[at] === "\n") records.push([]);
    at++;
  }
  return records.filter((record) => record.some((value) => value.trim()));
}

/** Takes the verdicts of a review.csv; a sentence that says what came of it. */
function loadReview(text) {
  const [header, ...records] = parseCsv(text);
  const names = (header || []).map((name) => name.trim().toLowerCase());
  const missing = ["id", "video_index", "verdict"].filter((name) => !names.includes(name));
  if (missing.length) return `This file has no column ${missing.join(", ")}.`;
  const byId = new Map();
  for (let i = 0; i < count; i++) byId.set(`${cell("video_index", i) ?? 0}:${cell("id", i)}`, i);
  let taken = 0, unknown = 0, bad = 0;
  for (const record of records) {
    const value = (name) => record[names.indexOf(name)] ?? "";
    const verdict = value("verdict").trim().toLowerCase(), key = value("work_key").trim(), take = value("take").trim();
    if (!verdict) continue;
    if (verdict !== APPROVED && verdict !== REJECTED) { bad++; continue; }
    const i = byId.get(`${value("video_index").trim()}:${value("id")}`);
    const fits = i !== undefined && !failed(i) && (!key || key === cell("work_key", i)) && (!take || Number(take) === takeOf(i));
    if (!fits) { unknown++; continue; }
    judge(i, { verdict, note: value("note").trim() });
    taken++;
  }
  verdictsChanged();
  const parts = [`${number.format(taken)} ${taken === 1 ? "verdict" : "verdicts"} loaded`];
  if (unknown) parts.push(`${number.format(unknown)} on videos that are not on this page`);
  if (bad) parts.push(`${number.format(bad)} neither approved nor rejected`);
  return parts.join(", ") + ".";
}
