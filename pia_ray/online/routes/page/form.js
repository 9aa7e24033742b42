// The form: what the server and the chosen model take, read into fields and pictures, and filled from them.

import { bytes, call, element, node } from "./parts.js";

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
/** Fields that count only beside others: of LoRAs, of the look. */
const NEEDS = {
  lora_scale: (model) => Object.keys(model.loras).length > 0,
  ip_adapter_scale: (model) => model.pictures.includes("ip_adapter_image"),
};

const form = node("form");

export let settings = { knobs: [], formats: {}, pictures: [], max_image_bytes: Infinity, needs_key: false };
export let picture = null; // a Blob
let pictures = {}; // further ones by field
let models = [];
let preview = null;

export async function prepare() {
  explainMotion();
  settings = await (await call("page/settings.json")).json();
  node("version").textContent = settings.version;
  node("key-row").hidden = !settings.needs_key;
  node("picture-hint").textContent = `JPEG, PNG, WebP, GIF and more, up to ${bytes(settings.max_image_bytes)}.`;
  for (const name of Object.keys(settings.formats)) node("format").append(new Option(name, name));
  node("pictures").append(...settings.pictures.map(pictureRow));
  node("knobs").append(...settings.knobs.map(knobRow));
  await listModels();
}

function knobRow(knob) {
  const row = element("div", { className: "knob", id: `${knob.name}-row` });
  if (!knob.is_number && !knob.choices.length) row.classList.add("long");
  const field = element(knob.choices.length ? "select" : "input", { id: knob.name, name: knob.name });
  if (knob.choices.length) {
    field.append(new Option("the model's", ""), ...knob.choices.map((each) => new Option(each, each)));
  } else {
    field.autocomplete = "off";
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

function pictureRow({ name, label, meaning }) {
  const row = element("div", { className: "knob", id: `${name}-row` });
  const field = element("input", { id: name, name, type: "file", accept: "image/*" });
  field.setAttribute("aria-describedby", `${name}-hint`);
  const remove = element("button", { type: "button", id: `${name}-remove`, textContent: "Remove", hidden: true });
  remove.setAttribute("aria-label", `Remove: ${label}`);
  field.onchange = () => field.files.length && choose(name, field.files[0]);
  remove.onclick = () => {
    choose(name, null);
    field.focus();
  };
  const chosen = element("span", { id: `${name}-chosen`, className: "chosen", hidden: true });
  const line = element("div", { className: "chosen-line" });
  line.append(chosen, remove);
  row.append(
    element("label", { htmlFor: name, textContent: label }),
    field,
    line,
    element("p", { id: `${name}-hint`, className: "hint", textContent: meaning }),
  );
  return row;
}

/** Takes one of the further pictures, or takes it back. */
function choose(name, blob) {
  pictures[name] = blob;
  if (!blob) node(name).value = "";
  // The browser names the file that was chosen here, and not one of an earlier video.
  const is_named = !blob || node(name).files.length > 0;
  node(`${name}-chosen`).textContent = is_named ? "" : `Chosen: ${blob.name ?? "the picture of before"}`;
  node(`${name}-chosen`).hidden = is_named;
  node(`${name}-remove`).hidden = !blob;
}

export async function listModels() {
  if (!node("key-row").hidden && !node("key").value) return;
  models = (await (await call("v1/models")).json()).data;
  const before = node("model").value;
  node("model").replaceChildren(...models.map((each) => new Option(each.id, each.id, each.default, each.default)));
  if (models.some((each) => each.id === before)) node("model").value = before;
  node("model-row").hidden = models.length < 2;
  node("model").onchange = describeModel;
  describeModel();
}

const model = () => models.find((each) => each.id === node("model").value);

/** Shows the fields that the chosen model takes, with its own values. */
function describeModel() {
  const chosen = model();
  if (!chosen) return;
  node("model-hint").textContent = chosen.description;
  for (const { name } of settings.pictures) node(`${name}-row`).hidden = !chosen.pictures.includes(name);
  for (const knob of settings.knobs) {
    node(`${knob.name}-row`).hidden = !(NEEDS[knob.name]?.(chosen) ?? true);
    const own = chosen.defaults[knob.name] ?? knob.default;
    if (knob.choices.length) node(knob.name).options[0].text = own ? `${own} (the model's)` : "the model's";
    else node(knob.name).placeholder = knob.name === "seed" ? "random" : own ?? "";
  }
  const names = Object.keys(chosen.loras);
  node("loras").hidden = !names.length;
  node("lora-fields").replaceChildren(
    ...names.map((name, at) => {
      const line = element("div");
      const field = element("input", { id: `lora-${at}`, name: "lora", inputMode: "decimal", autocomplete: "off" });
      field.dataset.lora = name;
      field.placeholder = chosen.loras[name];
      line.append(element("label", { htmlFor: field.id, textContent: name }), field);
      return line;
    }),
  );
}

export function explainMotion() {
  const { kind, strength } = motion();
  node("stage").dataset.kind = kind;
  node("stage").dataset.strength = strength;
  node("motion-text").textContent = `${KINDS[kind]} ${STRENGTHS[strength]}`;
}

function motion() {
  const chosen = (name) => form.querySelector(`input[name=${name}]:checked`).value;
  return { kind: chosen("kind"), strength: chosen("strength") };
}

export function choosePicture(blob) {
  picture = blob;
  if (preview) URL.revokeObjectURL(preview);
  node("preview").src = preview = URL.createObjectURL(blob);
  node("preview").hidden = false;
  const name = blob.name ?? "the picture of before";
  node("drop-text").textContent = `${name}, ${bytes(blob.size)}. Choose another.`;
}

/** The further pictures that the chosen model takes, by field. */
export function picturesOf() {
  const taken = model()?.pictures ?? [];
  return Object.fromEntries(Object.entries(pictures).filter(([name, blob]) => blob && taken.includes(name)));
}

/** The fields that are sent beside the pictures. Empty fields are not. */
export function fieldsOf() {
  const { kind, strength } = motion();
  const fields = { prompt: node("prompt").value, motion_scale: kind + strength, format: node("format").value };
  if (!node("model-row").hidden) fields.model = node("model").value;
  for (const { name } of settings.knobs) {
    const value = node(name).value.trim();
    if (value && !node(`${name}-row`).hidden) fields[name] = value;
  }
  const weights = [...form.querySelectorAll("[name=lora]")];
  if (weights.some((field) => field.value.trim())) {
    const chosen = weights.map((field) => [field.dataset.lora, field.value.trim() || field.placeholder]);
    fields.lora = chosen.filter(([, weight]) => Number(weight) !== 0).map((pair) => pair.join(":")).join("+") || "none";
  }
  return fields;
}

export function fillForm({ fields, picture: main, pictures: others = {} }) {
  node("prompt").value = fields.prompt;
  const [, kind, strength] = /^(.*-)?(\w+)$/.exec(fields.motion_scale);
  form.querySelector(`input[name=kind][value="${kind ?? ""}"]`).checked = true;
  form.querySelector(`input[name=strength][value="${strength}"]`).checked = true;
  explainMotion();
  node("format").value = fields.format;
  if (fields.model && [...node("model").options].some((each) => each.value === fields.model)) {
    node("model").value = fields.model;
    describeModel();
  }
  for (const { name } of settings.knobs) node(name).value = fields[name] ?? "";
  for (const { name } of settings.pictures) {
    choose(name, null);
    choose(name, others[name] ?? null);
  }
  if (fields.lora || Object.keys(others).length) node("more").open = true; // settings that are easily overlooked
  const weights = Object.fromEntries((fields.lora ?? "").split("+").map((each) => each.split(":")));
  for (const field of form.querySelectorAll("[name=lora]")) {
    field.value = fields.lora ? (weights[field.dataset.lora] ?? 0) : "";
  }
  if (main) choosePicture(main);
}

export async function useExample() {
  const answer = await call("page/example.jpg");
  choosePicture(new File([await answer.blob()], "example.jpg", { type: "image/jpeg" }));
  if (!node("prompt").value) node("prompt").value = "pan right, mountains at sunset";
}

/**
 * The form as a command. It asks for the animation in one call, while the page makes a job: a command that creates a
 * job would not have the file when it ends. The key is not part of it: the shell reads it from a variable.
 */
export function curlOf() {
  const fields = fieldsOf();
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const words = [`curl --fail-with-body ${quoted(new URL("v1/animations", location.href).href)}`];
  if (settings.needs_key) words.push('-H "Authorization: Bearer $PIA_RAY_API_KEY"');
  for (const [field, blob] of Object.entries({ image: picture ?? { name: "picture.jpg" }, ...picturesOf() })) {
    const name = blob.name ?? `${field}.jpg`;
    words.push(`-F ${quoted(`${field}=@"${name.replace(/["\\]/g, "\\$&")}"`)}`);
  }
  for (const [field, value] of Object.entries(fields)) words.push(`--form-string ${quoted(`${field}=${value}`)}`);
  return [...words, `-o ${quoted(`animation.${fields.format}`)}`].join(" \\\n  ");
}
