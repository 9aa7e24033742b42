// The page's script: sends the form as a video job, shows what becomes of the jobs and what this browser made.
// A job goes on at the server when the page is closed; the page finds it again by its id.
// No text of the server or of people becomes markup: everything goes through textContent.

import { choosePicture, curlOf, explainMotion, fieldsOf, fillForm, listModels, picture, picturesOf } from "./form.js";
import { prepare, useExample } from "./form.js";
import { cancel, contentOf, create, followed, hasEnded, read } from "./jobs.js";
import { bytes, duration, element, node, readKey, rememberKey, slug } from "./parts.js";
import { change, forgetId, openIds, rememberId } from "./store.js";

const MOST_KEPT = 24;
const MOST_KEPT_BYTES = 200_000_000;
const MOST_PAUSE_MS = 30_000;
const KEY = "pia-ray-key";

const form = node("form");

let past = []; // entries of videos, the newest first: {id, at, fields, picture, pictures, job, facts, thumbnail, video}
let shown = null; // the entry on display
let sending = null; // the AbortController of a form that is being sent
let urls = { original: null, video: null };
const following = new Map(); // by id, the AbortController of the present wait
const previews = new Map(); // by id, the URL of a picture

// ------------------------------------------------------------------ a new job

async function animate() {
  clearFault();
  if (!picture) {
    showFault({ message: "Choose a picture first.", param: "image" });
    return;
  }
  const entry = { picture, pictures: picturesOf(), fields: fieldsOf(), at: Date.now() };
  const body = new FormData();
  for (const [name, blob] of Object.entries({ image: picture, ...entry.pictures })) {
    body.append(name, blob, blob.name ?? "picture");
  }
  for (const [name, value] of Object.entries(entry.fields)) body.append(name, value);
  sending = new AbortController();
  node("go").disabled = true;
  renderWork();
  toResult();
  node("stop").focus({ preventScroll: true }); // the button that was pressed is disabled now
  say("Sending the picture.");
  const { signal } = sending;
  try {
    entry.job = await create(body, { key: randomText(), signal });
  } catch (error) {
    if (signal.aborted) say("Stopped.");
    else showFault(error.fault ?? { message: `The server cannot be reached or broke off: ${error.message}` });
  }
  sending = null; // from here on, "stop" ends the job
  node("go").disabled = false;
  if (!entry.job) {
    renderWork();
    return;
  }
  entry.id = entry.job.id;
  rememberId(entry.id);
  past.unshift(entry);
  show(entry);
  listPast();
  follow(entry);
  if (signal.aborted) await stop(entry); // the answer had come by then
  await keep(entry);
}

const randomText = () => [...crypto.getRandomValues(new Uint8Array(16))].map((each) => each.toString(16)).join("-");

// ------------------------------------------------------------------ jobs that go on

/** Follows a job to its end, and fetches its video. A server that cannot be reached is tried again. */
async function follow(entry) {
  if (following.has(entry.id)) return;
  let failures = 0;
  try {
    while (past.includes(entry)) {
      const turn = new AbortController();
      following.set(entry.id, turn);
      try {
        if (!hasEnded(entry.job)) await observe(entry, turn.signal);
        if (hasEnded(entry.job)) {
          await finish(entry, turn.signal);
          return;
        }
        failures = 0;
      } catch (error) {
        if (turn.signal.aborted) continue;
        const status = error.fault?.status;
        if (status === 401 || status === 403) return; // another key goes on
        if (status === 404 || status === 409) {
          lose(entry);
          return;
        }
        failures += 1;
        if (entry === shown) report("The server cannot be reached now; the page tries again", null);
        await pause(Math.min(MOST_PAUSE_MS, 1000 * 2 ** failures), turn.signal);
      }
    }
  } finally {
    following.delete(entry.id);
  }
}

/** Reads a job until it has changed: the one on display by its events, others now and then. A browser has six
 * connections to a server, and each stream takes one. */
async function observe(entry, signal) {
  if (entry === shown && !document.hidden) {
    for await (const job of followed(entry.id, signal)) update(entry, job);
  } else {
    const found = await read(entry.id, signal);
    update(entry, found.job);
    if (!hasEnded(found.job)) await pause(found.pause, signal);
  }
}

function update(entry, job) {
  entry.job = job;
  entry.fields ??= fieldsIn(job);
  const line = node("history").querySelector(`[data-id="${entry.id}"]`);
  if (line) describe(line, entry);
  if (entry === shown) renderWork();
}

async function finish(entry, signal) {
  if (entry.job.status === "completed") {
    report("Fetching the video", 1, entry);
    const video = await contentOf(entry.id, "video", signal);
    const thumbnail = await dataUrl(await contentOf(entry.id, "thumbnail", signal));
    Object.assign(entry, { video, thumbnail, facts: factsIn(entry.job) });
  }
  forgetId(entry.id);
  if (entry.job.error?.code === "cancelled") {
    drop(entry);
    if (entry === shown) clearShown();
    say("Stopped.");
    return;
  }
  listPast();
  if (entry === shown) show(entry);
  say(entry.video ? `The video is finished: ${entry.fields.prompt}` : `The video has failed: ${entry.fields.prompt}`);
  await keep(entry);
}

/** The server has the video no longer. */
function lose(entry) {
  forgetId(entry.id);
  drop(entry);
  if (entry !== shown) return;
  clearShown();
  showFault({ message: "The server has this video no longer: it was deleted, or was kept for its time." });
}

async function stop(entry) {
  try {
    update(entry, await cancel(entry.id));
  } catch (error) {
    if (error.fault?.status !== 409) throw error; // it has just ended
  }
  following.get(entry.id)?.abort();
}

function resume() {
  const known = new Set(past.map((entry) => entry.id));
  const unknown = openIds().filter((each) => !known.has(each));
  past.push(...unknown.map((id) => ({ id, at: Date.now(), fields: null, picture: null, pictures: {}, job: null })));
  if (unknown.length) listPast();
  const open = past.filter((entry) => !entry.video && entry.job?.status !== "failed");
  if (!shown && !sending && open.length) show(open[0]);
  for (const entry of open) follow(entry);
}

/** The form's fields of a job that this browser has no record of. */
function fieldsIn({ params, format, model }) {
  const number = typeof params.motion_scale === "number" ? params.motion_scale : 0;
  const motion = ["", "loop-", "style-"][Math.floor(number / 3)] + ["small", "moderate", "large"][number % 3];
  const texts = Object.entries(params).filter(([, value]) => ["string", "number"].includes(typeof value));
  const fields = Object.fromEntries(texts.map(([name, value]) => [name, String(value)]));
  return { ...fields, motion_scale: motion, format, model };
}

function factsIn(job) {
  const { width, height, num_frames, fps, format, size_bytes, animate_s } = job;
  return { seed: job.params.seed, width, height, num_frames, fps, format, size_bytes, animate_s, model: job.model_version };
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// ------------------------------------------------------------------ what is said

/** Shows what goes on: the form that is being sent, or the open job on display. */
function renderWork() {
  const job = shown?.job;
  const is_open = Boolean(sending || (shown && !shown.video && job?.status !== "failed"));
  if (!is_open && document.activeElement === node("stop")) node("result").focus({ preventScroll: true }); // it goes away
  node("work").hidden = !is_open;
  node("shown").classList.toggle("of-before", Boolean(sending));
  node("nothing").hidden = is_open || shown !== null || !node("fault").hidden;
  if (!is_open) return;
  if (sending) report("Sending the picture", null);
  else if (!job) report("Asking the server for the video", null);
  else if (job.status === "queued") {
    const place = job.queue_position > 0 ? `Waiting, place ${job.queue_position} in the queue` : "About to begin";
    report(place, null);
  } else if (job.status === "in_progress") {
    report(`${job.progress} percent${timeLeft(shown)}`, job.progress / 100);
  }
}

/** The time that is left by the pace since this page has seen the job's progress. */
function timeLeft(entry) {
  const { progress } = entry.job;
  entry.seen ??= { progress, at: performance.now() };
  const done = progress - entry.seen.progress;
  if (done <= 0) return "";
  const left_ms = ((performance.now() - entry.seen.at) / done) * (100 - progress);
  return `, about ${duration(left_ms / 1000)} left`;
}

/** Brings the result into sight: where it is below the form, from its start. */
function toResult() {
  const below = matchMedia("(max-width: 800px)").matches;
  node("result").scrollIntoView({ block: below || node("result").getBoundingClientRect().top < 0 ? "start" : "nearest" });
}

let told = "";
function report(text, share, entry = shown) {
  if (entry !== shown && !sending) return;
  node("work-text").textContent = text;
  if (share === null) node("bar").removeAttribute("value");
  else node("bar").value = share;
  const spoken = share === null ? text : `${25 * Math.floor(4 * share)} percent.`; // not every step: never quiet
  if (spoken !== told) say(spoken);
  told = spoken;
}

function say(text) {
  node("said").textContent = text;
}

function showFault(fault) {
  const { message, param, code, retry_after, request_id } = fault;
  const box = node("fault");
  const remarks = [
    retry_after && `Try again in ${duration(Number(retry_after))}.`,
    code && `Code ${code}.`,
    request_id && `Request ${request_id}.`,
  ].filter(Boolean);
  box.replaceChildren(message, ...(remarks.length ? [element("small", { textContent: remarks.join(" ") })] : []));
  const field = fieldNamed(param, code);
  if (field) field.closest(".knob, .row").append(box); // where it can be mended: on a phone the result is far away
  else node("result").prepend(box);
  box.hidden = false;
  node("nothing").hidden = true;
  say("");
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-errormessage", box.id);
    const folded = field.closest("details");
    if (folded) folded.open = true;
    field.focus();
  } else {
    node("result").focus();
  }
  box.scrollIntoView({ block: "nearest" });
}

/** The input that an error is about, if it is on the page. */
function fieldNamed(param, code) {
  if (code === "invalid_api_key") return node("key");
  if (param === "image" || (!param && code?.includes("image"))) return node("picture");
  return param ? form.querySelector(`[name="${CSS.escape(param)}"]`) : null;
}

function clearFault() {
  node("fault").hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  for (const field of form.querySelectorAll("[aria-errormessage]")) field.removeAttribute("aria-errormessage");
}

// ------------------------------------------------------------------ the result

/** Puts a video on display: finished, open, or failed. */
function show(entry) {
  const before = shown;
  shown = entry;
  for (const each of new Set([before, entry])) {
    if (each && !hasEnded(each.job)) following.get(each.id)?.abort(); // events for the one on display alone
  }
  node("shown").hidden = !entry.video;
  renderWork();
  markShown();
  if (entry.video) showVideo(entry);
  if (entry.job?.status === "failed") showFault(entry.job.error ?? { message: "The video has failed." });
}

function clearShown() {
  shown = null;
  node("shown").hidden = true;
  renderWork();
}

function showVideo({ facts, fields, picture: original, video }) {
  node("original").hidden = !original;
  if (original) node("original").src = newUrl("original", original);
  const source = newUrl("video", video);
  const moving = video.type.startsWith("video/");
  const player = element(moving ? "video" : "img", { src: source });
  if (moving) {
    Object.assign(player, { controls: true, loop: true, muted: true, playsInline: true });
    player.autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    player.setAttribute("aria-label", `The video: ${fields.prompt}`);
  } else {
    player.alt = `The animation: ${fields.prompt}`;
  }
  node("video").replaceChildren(player);
  node("shown-prompt").textContent = fields.prompt;
  const lines = {
    Motion: fields.motion_scale,
    Seed: facts.seed,
    Size: `${facts.width} × ${facts.height}`,
    Length: `${facts.num_frames} frames, ${duration(facts.num_frames / facts.fps)}`,
    File: `${facts.format}, ${bytes(facts.size_bytes)}`,
    "Made in": duration(facts.animate_s),
    Model: facts.model,
  };
  node("facts").replaceChildren(
    ...Object.entries(lines).map(([name, value]) => {
      const line = element("div");
      line.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
      return line;
    }),
  );
  node("download").href = source;
  node("download").download = `${slug(fields.prompt)}-${facts.seed}.${facts.format}`;
}

function newUrl(place, blob) {
  if (urls[place]) URL.revokeObjectURL(urls[place]);
  urls[place] = URL.createObjectURL(blob);
  return urls[place];
}

// ------------------------------------------------------------------ what this browser made

const inStore = (work) =>
  change(work, () => {
    node("past-hint").textContent = "This browser keeps no videos: they are gone when the page is closed.";
  });

async function keep(entry) {
  await recall(); // other tabs add to the same store
  if (!past.includes(entry)) return;
  const dropped = [];
  const sizeOf = (each) => (each.video?.size ?? 0) + (each.picture?.size ?? 0);
  const size = () => past.reduce((sum, each) => sum + sizeOf(each), 0);
  while (past.length > MOST_KEPT || (past.length > 1 && size() > MOST_KEPT_BYTES)) {
    const oldest = past.findLast((each) => each !== entry && (each.video || each.job?.status === "failed"));
    if (!oldest) break; // the others are open
    dropped.push(oldest.id);
    past = past.filter((each) => each !== oldest);
  }
  listPast();
  const { seen: _, ...kept } = entry;
  await inStore((store) => {
    store.put(kept);
    for (const id of dropped) store.delete(id);
  });
}

function listPast() {
  const focused = document.activeElement?.dataset?.id;
  node("forget").hidden = past.length === 0;
  node("history").replaceChildren(
    ...past.map((entry) => {
      const line = element("li");
      const open = element("button", { type: "button", className: "open" });
      open.dataset.id = entry.id;
      const state = element("small", { className: "state" });
      open.append(element("img", { alt: "" }), element("span"), state);
      describe(open, entry);
      open.onclick = () => {
        clearFault();
        show(entry);
        if (entry.job?.status !== "failed") node("result").focus({ preventScroll: true });
        toResult();
        say(`Shown: ${entry.fields?.prompt ?? entry.id}`);
      };
      const remove = element("button", { type: "button", className: "drop-one", textContent: "×" });
      remove.setAttribute("aria-label", `Forget: ${entry.fields?.prompt ?? entry.id}`);
      remove.onclick = () => guarded(() => forget(entry));
      line.append(open, remove);
      return line;
    }),
  );
  if (focused) node("history").querySelector(`[data-id="${focused}"]`)?.focus();
  markShown();
}

/** Writes an entry's picture, prompt and state into its line. */
function describe(line, entry) {
  const [image, prompt, state] = line.children;
  const source = entry.thumbnail ?? previewOf(entry);
  image.hidden = !source;
  if (source && image.src !== source) image.src = source;
  prompt.textContent = entry.fields?.prompt ?? "…";
  line.title = `${prompt.textContent}\n${new Date(entry.at).toLocaleString()}`;
  const { status, progress } = entry.job ?? {};
  const states = { queued: "waiting", in_progress: `${progress} %`, completed: "fetching", failed: "failed" };
  state.textContent = entry.video ? "" : states[status] ?? "asking";
  state.hidden = !state.textContent;
}

function previewOf(entry) {
  if (entry.picture && !previews.has(entry.id)) previews.set(entry.id, URL.createObjectURL(entry.picture));
  return previews.get(entry.id) ?? null;
}

function drop(entry) {
  past = past.filter((each) => each !== entry);
  URL.revokeObjectURL(previews.get(entry.id));
  previews.delete(entry.id);
  following.get(entry.id)?.abort();
  listPast();
  inStore((store) => store.delete(entry.id));
}

/** Removes an entry from this browser; an open job of it is cancelled, because nobody would fetch its video. */
async function forget(entry) {
  forgetId(entry.id);
  drop(entry);
  if (entry === shown && !entry.video) clearShown();
  (node("history").querySelector(".open") ?? node("go")).focus();
  say("Forgotten.");
  if (entry.job && !hasEnded(entry.job)) await cancel(entry.id).catch(() => null);
}

function markShown() {
  for (const each of node("history").querySelectorAll(".open")) {
    each.setAttribute("aria-current", String(each.dataset.id === shown?.id));
  }
}

async function recall() {
  const known = new Set(past.map((entry) => entry.id));
  const stored = (await inStore((store) => store.getAll())) ?? [];
  past.push(...stored.filter((entry) => !known.has(entry.id)));
  past.sort((one, other) => other.at - one.at);
  listPast();
}

// ------------------------------------------------------------------ what people do

const guarded = (work) =>
  work().catch((error) => showFault(error.fault ?? { message: `The server cannot be reached: ${error.message}` }));

async function copyCurl() {
  const text = curlOf();
  node("curl-text").textContent = text;
  node("curl-text").hidden = false;
  try {
    await navigator.clipboard.writeText(text);
    say("The command is copied.");
  } catch {
    say("The command is below the button."); // the clipboard needs https or localhost
  }
}

function pick(file) {
  clearFault();
  choosePicture(file);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!sending) guarded(animate);
});
form.addEventListener("change", (event) => {
  if (["kind", "strength"].includes(event.target.name)) explainMotion();
});
node("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
node("picture").addEventListener("change", () => {
  if (node("picture").files.length) pick(node("picture").files[0]);
});
node("preview").addEventListener("error", () => (node("preview").hidden = true)); // the server may know the format
node("key").addEventListener("change", () => {
  clearFault();
  rememberKey(KEY);
  guarded(listModels);
  resume();
});
node("example").addEventListener("click", () => {
  clearFault();
  guarded(useExample);
});
node("curl").addEventListener("click", () => guarded(copyCurl));
node("stop").addEventListener("click", () => {
  node("go").disabled = false;
  node("go").focus();
  if (sending) sending.abort();
  else guarded(() => stop(shown));
});
node("reuse").addEventListener("click", () => {
  clearFault();
  fillForm({ ...shown, fields: { ...shown.fields, seed: shown.facts.seed } });
  node("prompt").focus();
  say("The form has these settings.");
});
node("forget").addEventListener("click", () =>
  guarded(async () => {
    const all = past;
    for (const entry of all) forget(entry);
    node("go").focus();
    say("All forgotten.");
  }),
);
document.addEventListener("visibilitychange", () => {
  if (shown && !hasEnded(shown.job)) following.get(shown.id)?.abort();
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    node("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) node("drop").classList.remove("over");
});
const takeFrom = (transfer) => {
  const file = [...(transfer?.files ?? [])][0];
  if (file) pick(file);
  return Boolean(file);
};
document.addEventListener("drop", (event) => {
  event.preventDefault();
  node("drop").classList.remove("over");
  takeFrom(event.dataTransfer);
});
document.addEventListener("paste", (event) => {
  if (takeFrom(event.clipboardData)) event.preventDefault();
});

node("key").value = readKey(KEY);
guarded(async () => {
  await recall();
  await prepare();
  resume();
});
