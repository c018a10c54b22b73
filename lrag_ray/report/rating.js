"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const storeKey = "rating-" + data.export;
let answers = {}, rater = "", at = 0, urls = [];
try {
  const kept = JSON.parse(localStorage.getItem(storeKey) || "{}");
  answers = kept.answers || {};
  rater = kept.rater || "";
} catch (error) { /* a browser without storage keeps answers until the page is closed */ }

function keep() {
  try { localStorage.setItem(storeKey, JSON.stringify({ answers, rater })); } catch (error) { /* see above */ }
  const done = data.cases.filter((each) => answers[each.id]).length;
  byId("progress").textContent = `Case ${at + 1} of ${data.cases.length}, ${done} answered`;
  byId("save").disabled = !rater || !done;
}

function videoElement(name, label) {
  const bytes = Uint8Array.from(atob(data.videos[name]), (c) => c.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  urls.push(url);
  const figure = document.createElement("figure");
  const video = Object.assign(document.createElement("video"), { src: url, controls: true, muted: true, loop: true });
  video.setAttribute("aria-label", label);
  const caption = document.createElement("figcaption");
  caption.textContent = label;
  figure.append(caption, video);
  return figure;
}

function show(index) {
  at = Math.max(0, Math.min(data.cases.length - 1, index));
  const item = data.cases[at], given = answers[item.id];
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [];
  byId("question").textContent = item.question;
  const labels = item.videos.length > 1 ? ["A", "B"] : ["Video"];
  byId("videos").replaceChildren(...item.videos.map((name, i) => videoElement(name, labels[i])));
  byId("choices").replaceChildren(...item.choices.map((choice) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "answer", value: choice });
    input.checked = Boolean(given) && given.answer === choice;
    input.addEventListener("change", () => {
      answers[item.id] = { answer: choice, note: byId("note").value };
      keep();
    });
    label.append(input, " " + choice);
    return label;
  }));
  byId("note").value = given ? given.note : "";
  byId("back").disabled = at === 0;
  byId("next").disabled = at === data.cases.length - 1;
  keep();
}

byId("rater").value = rater;
byId("rater").addEventListener("input", () => { rater = byId("rater").value.trim(); keep(); });
byId("note").addEventListener("input", () => {
  const given = answers[data.cases[at].id];
  if (given) { given.note = byId("note").value; keep(); }
});
byId("back").addEventListener("click", () => show(at - 1));
byId("next").addEventListener("click", () => show(at + 1));
byId("save").addEventListener("click", () => {
  const text = JSON.stringify({ export: data.export, rater, answers }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `answers-${data.export}.json`;
  link.click();
});
show(Math.max(0, data.cases.findIndex((each) => !answers[each.id])));
