// Video jobs at the server: made, read, followed, cancelled, fetched.

import { call, eventsOf, refused } from "./parts.js";

const FIRST_PAUSE_MS = 1000;

export const hasEnded = (job) => job?.status === "completed" || job?.status === "failed";

/** The new job of a form. A form that is sent again after a lost answer makes no second one. */
export async function create(body, { key, signal }) {
  const headers = { "idempotency-key": key };
  return (await call("v1/videos", { method: "POST", body, headers, signal })).json();
}

/** The job, and the milliseconds until it is to be read again. */
export async function read(id, signal) {
  const answer = await call(`v1/videos/${id}`, { signal });
  const pause = Number(answer.headers.get("openai-poll-after-ms")) || FIRST_PAUSE_MS;
  return { job: await answer.json(), pause };
}

/** The job at once and after each change, to its end or to that of the stream. */
export async function* followed(id, signal) {
  const answer = await call(`v1/videos/${id}/events`, { headers: { accept: "text/event-stream" }, signal });
  for await (const { name, value } of eventsOf(answer.body)) {
    if (name === "error") throw refused({ ...value.error, status: value.error.code?.endsWith("not_found") ? 404 : 500 });
    yield value;
  }
}

export async function cancel(id) {
  return (await call(`v1/videos/${id}/cancel`, { method: "POST" })).json();
}

/** The file of a completed job. `redirect=0`: this page reads nothing of other origins, such as the store's. */
export async function contentOf(id, variant, signal) {
  return (await call(`v1/videos/${id}/content?variant=${variant}&redirect=0`, { signal })).blob();
}
