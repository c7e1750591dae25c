// Shows the download, asks the worker, and shows each answer with the member that gave it.

const element = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
let members = [];
let texts = [];
let chosen; // threshold; undefined: the bundle's
let failed = false;

worker.onmessage = ({ data }) => {
  if (data.error) {
    failed ||= !members.length;
    show(data.error);
  } else if (data.received) failed || showProgress(data.received, data.total);
  else if (data.members) start(data);
  else if (data.predictions) showAnswers(data);
};
worker.onerror = (event) => show(event.message || "The worker could not be started.");

element("form").onsubmit = (event) => {
  event.preventDefault();
  texts = element("texts").value.split("\n").filter((line) => line.trim());
  element("classify").disabled = true;
  worker.postMessage({ texts, thresholds: chosen });
};
element("threshold").oninput = () => {
  chosen = Number(element("threshold").value);
  element("tau").value = chosen.toFixed(2);
};

function show(message) {
  element("status").textContent = message;
  element("classify").disabled = !members.length;
}

function showProgress(received, total) {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  element("progress").max = total ?? received;
  element("progress").value = received;
  show(`Loading the model: ${megabytes(received)}${total ? ` of ${megabytes(total)}` : ""} MB`);
}

function start(cascade) {
  members = cascade.members;
  element("progress").hidden = true;
  element("threshold").disabled = false;
  const tau = cascade.thresholds[0] ?? 0;
  element("threshold").value = tau;
  element("tau").value = tau.toFixed(2);
  const names = members.map(({ name, layers }) => `${name} (${layers} layers)`).join(", then ");
  show(`Ready: ${names}; ${cascade.labels.length} labels, ${cascade.threads} thread${cascade.threads > 1 ? "s" : ""}.`);
}

function showAnswers({ predictions, milliseconds }) {
  element("answers").replaceChildren(
    ...predictions.map(({ label, score, exit, layers }, index) => {
      const row = document.createElement("tr");
      for (const value of [texts[index], label, score.toFixed(3), members[exit].name, layers]) {
        row.insertCell().textContent = value;
      }
      row.dataset.exit = exit;
      return row;
    }),
  );
  element("table").hidden = !predictions.length;
  const biggest = members.at(-1).layers;
  const executed = predictions.reduce((sum, { layers }) => sum + layers, 0) / predictions.length;
  const speedup = executed ? `${(biggest / executed).toFixed(2)}x` : "-"; // members without layers answered all texts
  const count = `${predictions.length} text${predictions.length === 1 ? "" : "s"}`;
  show(predictions.length ? `${count} in ${milliseconds.toFixed(0)} ms; layer speed-up ${speedup}.` : "Enter a text.");
}
