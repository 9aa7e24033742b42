// The playground's script: fills the form, reads the events of POST /v1/animations, keeps what this browser made.
// No text of the server or of people becomes markup: everything goes through textContent.

const MOST_KEPT = 24;
const MOST_KEPT_BYTES = 200_000_000;
const KEY = "pia-ray-key";

const KINDS = {
  "": "The video leaves the picture and ends elsewhere.",
  "loop-": "Goes out and comes back: the last frame is the picture again, so it can play round and round.",
  "style-": "Moves and changes its look on the way: the prompt and the model's style win over the picture.",
};
const STRENGTHS = {
  small: "Small: all frames stay close to the picture, as when hair, water or light moves.",
  moderate: "Moderate: things move visibly; fine details may change.",
  large: "Large: the most freedom, for big movements; details drift from the picture the most.",
};

const node = (id) => document.getElementById(id);
const form = node("form");

let settings = { knobs: [], formats: {}, max_image_bytes: Infinity, needs_key: false };
let picture = null; // a Blob
let running = null; // the AbortController of the call
let shown = null; // the entry on display
let urls = { preview: null, original: null, video: null };

// ------------------------------------------------------------------ the form

async function start() {
  explainMotion();
  node("key").value = readKey();
  const answer = await fetch("page/settings.json");
  if (!answer.ok) throw await faultOf(answer);
  settings = await answer.json();
  node("version").textContent = settings.version;
  node("key-row").hidden = !settings.needs_key;
  node("picture-hint").textContent = `JPEG, PNG, WebP, GIF and more, up to ${bytes(settings.max_image_bytes)}.`;
  for (const name of Object.keys(settings.formats)) node("format").append(new Option(name, name));
  for (const knob of settings.knobs) node("knobs").append(fieldOf(knob));
  await listModels();
}

function fieldOf(knob) {
  const row = element("div", { className: "knob" });
  if (!knob.is_number && !knob.choices.length) row.classList.add("long");
  const field = element(knob.choices.length ? "select" : "input", { id: knob.name, name: knob.name });
  if (knob.choices.length) {
    field.append(new Option("the model's", ""), ...knob.choices.map((each) => new Option(each, each)));
  } else {
    field.autocomplete = "off";
    field.placeholder = knob.name === "seed" ? "random" : "";
    if (knob.is_number) field.inputMode = knob.is_integer ? "numeric" : "decimal";
  }
  field.setAttribute("aria-describedby", `${knob.name}-hint`);
  const range = knob.choices.length || !knob.bounds ? "" : ` ${knob.bounds}${knob.unit ? ` ${knob.unit}` : ""}.`;
  const meaning = knob.name === "seed" ? "The same seed gives the same video again." : knob.meaning;
  row.append(
    element("label", { htmlFor: knob.name, textContent: knob.label }),
    field,
    element("p", { id: `${knob.name}-hint`, className: "hint", textContent: meaning + range }),
  );
  return row;
}

async function listModels() {
  if (!node("key-row").hidden && !node("key").value) return;
  const answer = await fetch("v1/models", { headers: authorization() });
  if (!answer.ok) throw await faultOf(answer);
  const models = (await answer.json()).data;
  node("model").replaceChildren(...models.map((each) => new Option(each.id, each.id, each.default, each.default)));
  node("model-row").hidden = models.length < 2;
  const describe = () => {
    node("model-hint").textContent = models.find((each) => each.id === node("model").value)?.description ?? "";
  };
  node("model").onchange = describe;
  describe();
}

function explainMotion() {
  const { kind, strength } = motion();
  node("stage").dataset.kind = kind;
  node("stage").dataset.strength = strength;
  node("motion-text").textContent = `${KINDS[kind]} ${STRENGTHS[strength]}`;
}

function motion() {
  const chosen = (name) => form.querySelector(`input[name=${name}]:checked`).value;
  return { kind: chosen("kind"), strength: chosen("strength") };
}

function choosePicture(blob) {
  picture = blob;
  clearFault();
  node("preview").src = newUrl("preview", blob);
  node("preview").hidden = false;
  const name = blob.name ?? "the picture of before";
  node("drop-text").textContent = `${name}, ${bytes(blob.size)}. Choose another.`;
}

/** What is sent beside the picture. Empty fields are not. */
function fieldsOf() {
  const { kind, strength } = motion();
  const fields = { prompt: node("prompt").value, motion_scale: kind + strength, format: node("format").value };
  if (!node("model-row").hidden) fields.model = node("model").value;
  for (const { name } of settings.knobs) {
    const value = node(name).value.trim();
    if (value) fields[name] = value;
  }
  return fields;
}

function fillForm(fields) {
  node("prompt").value = fields.prompt;
  const [, kind, strength] = /^(.*-)?(\w+)$/.exec(fields.motion_scale);
  form.querySelector(`input[name=kind][value="${kind ?? ""}"]`).checked = true;
  form.querySelector(`input[name=strength][value="${strength}"]`).checked = true;
  explainMotion();
  node("format").value = fields.format;
  if (fields.model && [...node("model").options].some((each) => each.value === fields.model)) {
    node("model").value = fields.model;
    node("model").dispatchEvent(new Event("change"));
  }
  for (const { name } of settings.knobs) node(name).value = fields[name] ?? "";
}

async function useExample() {
  const answer = await fetch("page/example.jpg");
  if (!answer.ok) throw await faultOf(answer);
  choosePicture(new File([await answer.blob()], "example.jpg", { type: "image/jpeg" }));
  if (!node("prompt").value) node("prompt").value = "pan right, mountains at sunset";
}

/** The call of the form as a command. The key is not part of it: the shell reads it from a variable. */
function curlOf(fields) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const name = picture?.name ?? "picture.jpg";
  const words = [`curl --fail-with-body ${quoted(new URL("v1/animations", location.href).href)}`];
  if (settings.needs_key) words.push('-H "Authorization: Bearer $PIA_RAY_API_KEY"');
  words.push(`-F ${quoted(`image=@"${name.replace(/["\\]/g, "\\$&")}"`)}`);
  for (const [field, value] of Object.entries(fields)) words.push(`--form-string ${quoted(`${field}=${value}`)}`);
  return [...words, `-o ${quoted(`animation.${fields.format}`)}`].join(" \\\n  ");
}

async function copyCurl() {
  const text = curlOf(fieldsOf());
  node("curl-text").textContent = text;
  node("curl-text").hidden = false;
  try {
    await navigator.clipboard.writeText(text);
    say("The command is copied.");
  } catch {
    say("The command stands below the button."); // the clipboard needs https or localhost
  }
}

// ------------------------------------------------------------------ one call

async function animate() {
  clearFault();
  if (!picture) {
    showFault({ message: "Choose a picture first.", param: "image" });
    return;
  }
  const fields = fieldsOf();
  const entry = { picture, fields, at: Date.now() };
  const body = new FormData();
  body.append("image", picture, picture.name ?? "picture");
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  running = new AbortController();
  working(true);
  report("Sending the picture", null);
  say("Sending the picture.");
  try {
    const headers = { accept: "text/event-stream", ...authorization() };
    const answer = await fetch("v1/animations", { method: "POST", body, headers, signal: running.signal });
    if (!answer.ok) throw await faultOf(answer);
    const made = await followed(answer);
    const video = blobOf(made.video);
    const { video: _, thumbnail, ...facts } = made;
    Object.assign(entry, { id: made.id, facts, thumbnail, video });
    show(entry);
    say("The video is finished.");
    await keep(entry);
  } catch (error) {
    if (running.signal.aborted) {
      say("Stopped.");
      node("nothing").hidden = shown !== null;
    } else {
      showFault(error.fault ?? { message: `The server cannot be reached or broke off: ${error.message}` });
    }
  } finally {
    running = null;
    if (document.activeElement === node("stop")) node("result").focus({ preventScroll: true }); // it goes away
    working(false);
  }
}

/** Reads the events to the end; gives what came with the last, `completed`. */
async function followed(answer) {
  let told = -1;
  let first = null;
  for await (const { name, value } of eventsOf(answer.body)) {
    if (name === "error") throw refused(value.error);
    if (name === "completed") return value;
    if (name === "queued") {
      const place = value.position > 0 ? `Waiting, place ${value.position} in the queue` : "About to begin";
      report(place, null);
      say(place);
    } else if (name === "step") {
      const { done, total } = value;
      first ??= { done, at: performance.now() };
      const pace = (performance.now() - first.at) / Math.max(1, done - first.done);
      const left = done > first.done && done < total ? `, about ${duration((pace * (total - done)) / 1000)} left` : "";
      report(done < total ? `Step ${done} of ${total}${left}` : "Finishing the video", done / total);
      const quarter = Math.floor((4 * done) / total);
      if (quarter > told && quarter < 4) {
        told = quarter;
        say(`${Math.round((100 * done) / total)} percent.`); // not every step: that would never be quiet
      }
    }
  }
  throw refused({ message: "The server broke off before the video was finished." });
}

async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const from = Math.max(0, buffer.length - 1); // a long event comes in many pieces: look at the new ones only
    buffer += value;
    let end = buffer.indexOf("\n\n", from);
    while (end >= 0) {
      const event = eventOf(buffer.slice(0, end));
      if (event) yield event;
      buffer = buffer.slice(end + 2);
      end = buffer.indexOf("\n\n");
    }
  }
}

function eventOf(block) {
  const found = /^event: (.*)\ndata: (.*)$/s.exec(block);
  return found && { name: found[1], value: JSON.parse(found[2]) };
}

// ------------------------------------------------------------------ what is said

function working(at_work) {
  node("work").hidden = !at_work;
  node("shown").classList.toggle("of-before", at_work);
  node("go").disabled = at_work;
  if (!at_work) return;
  node("nothing").hidden = true;
  toResult();
  node("stop").focus({ preventScroll: true }); // the button that was pressed is disabled now
}

/** Brings the result into sight: where it stands below the form, from its start. */
function toResult() {
  const below = matchMedia("(max-width: 800px)").matches;
  node("result").scrollIntoView({ block: below || node("result").getBoundingClientRect().top < 0 ? "start" : "nearest" });
}

function report(text, share) {
  node("work-text").textContent = text;
  if (share === null) node("bar").removeAttribute("value");
  else node("bar").value = share;
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

function refused(fault) {
  return Object.assign(new Error(fault.message), { fault });
}

async function faultOf(answer) {
  const request_id = answer.headers.get("x-request-id");
  if (answer.status === 401) node("key-row").hidden = false;
  let said = null;
  try {
    said = (await answer.json()).error;
  } catch {
    // a proxy's own page
  }
  const message = said?.message ?? `The server answered ${answer.status} ${answer.statusText}.`;
  return refused({ ...said, message, retry_after: answer.headers.get("retry-after"), request_id });
}

// ------------------------------------------------------------------ the result

function show(entry) {
  shown = entry;
  const { facts, fields } = entry;
  node("nothing").hidden = true;
  node("shown").hidden = false;
  node("original").src = newUrl("original", entry.picture);
  const source = newUrl("video", entry.video);
  const moving = entry.video.type.startsWith("video/");
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
  markShown();
}

function newUrl(place, blob) {
  if (urls[place]) URL.revokeObjectURL(urls[place]);
  urls[place] = URL.createObjectURL(blob);
  return urls[place];
}

function blobOf(url) {
  const [, type, text] = /^data:([^;]+);base64,(.*)$/s.exec(url);
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type });
}

// ------------------------------------------------------------------ what this browser made

let past = []; // the newest first

async function keep(entry) {
  await recall(); // other tabs add to the same store
  past.unshift(entry);
  const dropped = [];
  const size = () => past.reduce((sum, each) => sum + each.video.size + each.picture.size, 0);
  while (past.length > MOST_KEPT || (past.length > 1 && size() > MOST_KEPT_BYTES)) dropped.push(past.pop().id);
  listPast();
  await change((store) => {
    store.put(entry);
    for (const id of dropped) store.delete(id);
  });
}

function listPast() {
  node("forget").hidden = past.length === 0;
  node("history").replaceChildren(
    ...past.map((entry) => {
      const line = element("li");
      const when = new Date(entry.at).toLocaleString();
      const open = element("button", { type: "button", className: "open", title: `${entry.fields.prompt}\n${when}` });
      open.dataset.id = entry.id;
      open.append(
        element("img", { src: entry.thumbnail, alt: "" }),
        element("span", { textContent: entry.fields.prompt }),
      );
      open.onclick = () => {
        show(entry);
        node("result").focus({ preventScroll: true });
        toResult();
        say(`Shown: ${entry.fields.prompt}`);
      };
      const remove = element("button", { type: "button", className: "drop-one", textContent: "×" });
      remove.setAttribute("aria-label", `Forget: ${entry.fields.prompt}`);
      remove.onclick = async () => {
        past = past.filter((each) => each !== entry);
        listPast();
        (node("history").querySelector(".open") ?? node("go")).focus();
        say("Forgotten.");
        await change((store) => store.delete(entry.id));
      };
      line.append(open, remove);
      return line;
    }),
  );
  markShown();
}

function markShown() {
  for (const each of node("history").querySelectorAll(".open")) {
    each.setAttribute("aria-current", String(each.dataset.id === shown?.id));
  }
}

async function recall() {
  const stored = await change((store) => store.getAll());
  if (stored) past = stored.sort((one, other) => other.at - one.at);
  listPast();
}

/** Works on the store; gives the result of the request that `work` returns. A browser without one keeps nothing. */
function change(work) {
  return new Promise((resolve) => {
    const without = () => {
      node("past-hint").textContent = "This browser keeps nothing: the list is gone when the page is closed.";
      resolve(null);
    };
    let opening;
    try {
      opening = indexedDB.open("pia-ray", 1);
    } catch {
      without();
      return;
    }
    opening.onupgradeneeded = () => opening.result.createObjectStore("animations", { keyPath: "id" });
    opening.onerror = without;
    opening.onsuccess = () => {
      const transaction = opening.result.transaction("animations", "readwrite");
      const request = work(transaction.objectStore("animations"));
      transaction.oncomplete = () => {
        opening.result.close();
        resolve(request?.result ?? null);
      };
      transaction.onabort = () => {
        opening.result.close();
        without(); // no room, as a rule
      };
    };
  });
}

// ------------------------------------------------------------------ small parts

function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

function authorization() {
  const key = node("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // storage is switched off
  }
}

function rememberKey() {
  try {
    sessionStorage.setItem(KEY, node("key").value.trim());
  } catch {
    // asked for again in the next tab
  }
}

function bytes(number) {
  return number < 1e6 ? `${Math.max(1, Math.round(number / 1e3))} kB` : `${+(number / 1e6).toFixed(1)} MB`;
}

function duration(seconds) {
  return seconds < 90 ? `${+seconds.toFixed(seconds < 10 ? 1 : 0)} s` : `${Math.round(seconds / 60)} min`;
}

function slug(text) {
  return text.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40).replace(/^-+|-+$/g, "") || "animation";
}

const guarded = (work) =>
  work().catch((error) => showFault(error.fault ?? { message: `The server cannot be reached: ${error.message}` }));

// ------------------------------------------------------------------ what people do

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) animate();
});
form.addEventListener("change", (event) => {
  if (["kind", "strength"].includes(event.target.name)) explainMotion();
});
node("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
node("picture").addEventListener("change", () => {
  if (node("picture").files.length) choosePicture(node("picture").files[0]);
});
node("preview").addEventListener("error", () => (node("preview").hidden = true)); // the server may know the format
node("key").addEventListener("change", () => {
  clearFault();
  rememberKey();
  guarded(listModels);
});
node("example").addEventListener("click", () => guarded(useExample));
node("curl").addEventListener("click", () => guarded(copyCurl));
node("stop").addEventListener("click", () => {
  running?.abort();
  node("go").disabled = false;
  node("go").focus();
});
node("reuse").addEventListener("click", () => {
  fillForm({ ...shown.fields, seed: shown.facts.seed });
  choosePicture(shown.picture);
  node("prompt").focus();
  say("The form has these settings.");
});
node("forget").addEventListener("click", async () => {
  past = [];
  listPast();
  node("go").focus();
  say("All forgotten.");
  await change((store) => store.clear());
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
  if (file) choosePicture(file);
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

recall();
guarded(start);
