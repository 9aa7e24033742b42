// The script of the operator's page: reads GET /operator/jobs now and then, queues failed jobs again, cancels open ones.
// No text of the server or of people becomes markup: everything goes through textContent.

import { call, duration, element, node, readKey, rememberKey } from "./parts.js";

const KEY = "pia-ray-operator-key";
const EVERY_MS = 10_000;

let timer = null;

async function refresh() {
  clearTimeout(timer);
  if (document.hidden || !node("key").value.trim()) return;
  try {
    show(await (await call("operator/jobs")).json());
    node("fault").hidden = true;
  } catch (error) {
    fail(error);
  }
  timer = setTimeout(refresh, EVERY_MS);
}

function show({ now, owners, has_more, open, failed }) {
  fill("owners", owners, (each) => [each.owner, each.num_jobs, each.num_lines]);
  node("more").hidden = !has_more;
  fill("open", open, (job) => [
    jobCell(job),
    job.status === "in_progress" ? `${job.progress} %` : job.claimed_by ? "starting" : "waiting",
    duration(Math.max(0, now - job.created_at)),
    job.owner,
    button("Cancel", job, "cancel"),
  ]);
  fill("failed", failed, (job) => [
    jobCell(job),
    `${job.error?.code ?? "unknown"}: ${job.error?.message ?? ""}`,
    `${duration(Math.max(0, now - job.completed_at))} ago`,
    job.owner,
    job.batch_id ? "line of a batch" : button("Retry", job, "retry"),
  ]);
  const of_all = has_more ? "more than " : "";
  const num = owners.reduce((sum, each) => sum + each.num_jobs + each.num_lines, 0);
  node("state").textContent = `${of_all}${num} open, ${failed.length} of the latest failed. Read ${new Date().toLocaleTimeString()}.`;
}

function fill(id, rows, cellsOf) {
  const focused = document.activeElement?.dataset?.job;
  node(id).replaceChildren(
    ...rows.map((row) => {
      const line = element("tr");
      line.append(
        ...cellsOf(row).map((content) => {
          const cell = element("td");
          cell.append(content);
          return cell;
        }),
      );
      return line;
    }),
  );
  if (focused) node(id).querySelector(`[data-job="${focused}"]`)?.focus();
}

function jobCell(job) {
  const cell = element("div");
  const repeats = job.attempt + job.retries > 1 ? `, attempt ${job.attempt}, retries ${job.retries}` : "";
  const hook = job.webhook ? `, webhook ${job.webhook.state}` : "";
  cell.append(
    element("div", { className: "prompt", textContent: job.prompt }),
    element("small", { textContent: `${job.id}, ${job.model}${repeats}${hook}` }),
  );
  return cell;
}

function button(text, job, action) {
  const found = element("button", { type: "button", textContent: text });
  found.dataset.job = job.id;
  found.setAttribute("aria-label", `${text}: ${job.id}`);
  found.onclick = async () => {
    found.disabled = true;
    try {
      await call(`operator/jobs/${encodeURIComponent(job.owner)}/${job.id}/${action}`, { method: "POST" });
      await refresh();
    } catch (error) {
      found.disabled = false;
      fail(error);
    }
  };
  return found;
}

function fail(error) {
  node("fault").textContent = error.fault?.message ?? `The server cannot be reached: ${error.message}`;
  node("fault").hidden = false;
}

node("key").value = readKey(KEY);
node("key").addEventListener("change", () => {
  rememberKey(KEY);
  refresh();
});
document.addEventListener("visibilitychange", refresh);
refresh();
