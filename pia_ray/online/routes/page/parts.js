// Small parts of the pages' scripts: elements, numbers as text, calls with the key, errors, event streams.

export const node = (id) => document.getElementById(id);

export function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

export function bytes(number) {
  return number < 1e6 ? `${Math.max(1, Math.round(number / 1e3))} kB` : `${+(number / 1e6).toFixed(1)} MB`;
}

export function duration(seconds) {
  if (seconds < 90) return `${+seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${+(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`;
}

export function slug(text) {
  return text.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40).replace(/^-+|-+$/g, "") || "animation";
}

export function readKey(name) {
  try {
    return sessionStorage.getItem(name) ?? "";
  } catch {
    return ""; // storage is switched off
  }
}

export function rememberKey(name) {
  try {
    sessionStorage.setItem(name, node("key").value.trim());
  } catch {
    // asked for again in the next tab
  }
}

/** The answer of a call with the key of the page; an answer that is an error is thrown. */
export async function call(path, options = {}) {
  const key = node("key").value.trim();
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) throw await faultOf(answer);
  return answer;
}

export function refused(fault) {
  return Object.assign(new Error(fault.message), { fault });
}

export async function faultOf(answer) {
  const request_id = answer.headers.get("x-request-id");
  if (answer.status === 401) node("key-row").hidden = false;
  let said = null;
  try {
    said = (await answer.json()).error;
  } catch {
    // a proxy's own page
  }
  const message = said?.message ?? `The server answered ${answer.status} ${answer.statusText}.`;
  const retry_after = answer.headers.get("retry-after");
  return refused({ ...said, message, retry_after, request_id, status: answer.status });
}

export async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const from = Math.max(0, buffer.length - 1); // a long event comes in many pieces: only the new ones are searched
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
