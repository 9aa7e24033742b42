const { count, columns, extra, knobs, hints, judged, output } = JSON.parse(document.getElementById("rows").textContent);
const $ = (id) => document.getElementById(id);
// A column is a plain list, or its distinct values and an index into them.
const at = (column, i) => (column.v ? column.v[i] : column.d[column.i[i]]);
const cell = (name, i) => (columns[name] ? at(columns[name], i) : null);
const number = new Intl.NumberFormat("en");
const seconds = (s) => (s == null ? null : s < 10 ? `${s.toFixed(2)} s` : s < 120 ? `${s.toFixed(1)} s` : `${(s / 60).toFixed(1)} min`);
const bytes = (n) => (n == null ? null : n < 1e6 ? `${(n / 1e3).toFixed(0)} kB` : `${(n / 1e6).toFixed(1)} MB`);
const failed = (i) => cell("status", i) !== "succeeded";
const label = (i) => cell("id", i) + (cell("video_index", i) ? ` (video ${cell("video_index", i)})` : "");
const shortly = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(3));
const worded = (name) => name.replaceAll("_", " ");
const flags = (i) => cell("flags", i)?.replaceAll("_", " ").replaceAll(",", ", ");
const motion = (i) => {
  const scale = cell("motion_scale", i);
  return scale == null ? null : `${scale} · ${cell("motion_name", i)}`;
};

function el(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}
