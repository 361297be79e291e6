"use strict";
// The page works without this file. It loads results in place, takes pictures, and keeps marks.

const byId = (id) => document.getElementById(id);
const say = (text, isError = false) => {
  byId("status").textContent = text;
  byId("status").classList.remove("hidden");
  byId("status").classList.toggle("error", isError);
};
let latest = 0;

// Show the page at a URL. `how` is "push" for a new entry of the history, "none" for the current one.
async function show(url, how = "push") {
  const number = ++latest;
  byId("results").setAttribute("aria-busy", "true");
  say("Searching …");
  let text;
  try {
    const response = await fetch(url, { headers: { accept: "text/html" } });
    if (response.status === 401) return location.reload();
    text = await response.text();
  } catch {
    if (number !== latest) return;
    byId("results").removeAttribute("aria-busy");
    return say("The server does not answer. Is `sail-align serve` still running?", true);
  }
  if (number !== latest) return;
  const page = new DOMParser().parseFromString(text, "text/html");
  if (!page.getElementById("results")) return say("The server's answer cannot be shown.", true);
  const focused = document.activeElement?.id;
  page.getElementById("filters").open = byId("filters").open || "set" in page.getElementById("filters").dataset;
  if (how === "push" && url !== location.pathname + location.search) history.pushState(null, "", url);
  document.title = page.title;
  for (const id of ["search", "results"]) byId(id).replaceWith(document.adoptNode(page.getElementById(id)));
  if (how === "push") scrollTo(0, 0);
  if (focused && byId(focused)) byId(focused).focus({ preventScroll: true });
  else byId("results").focus({ preventScroll: true });
  begin();
}

// On narrow screens, filters that are not set are closed.
if (matchMedia("(max-width: 40rem)").matches && !("set" in byId("filters").dataset)) byId("filters").open = false;

// Summarise the results for screen readers, tick the marks, and watch the progress.
function begin() {
  const found = [...document.querySelectorAll("[data-status]")];
  const isError = found.some((each) => each.dataset.status === "error");
  say(found.map((each) => each.textContent).join(" "), isError);
  byId("status").classList.toggle("hidden", found.length > 0);
  showMarks();
  if (byId("progress")) watch();
}

async function watch() {
  try {
    const state = await (await fetch("/progress")).json();
    const bar = byId("progress");
    if (!bar) return;
    bar.value = state.done;
    say(`${state.done.toLocaleString("en")} of ${state.total.toLocaleString("en")} images embedded`);
    if (state.ready) return show(location.pathname + location.search, "none");
  } catch {
    return say("The server does not answer. Is `sail-align serve` still running?", true);
  }
  setTimeout(watch, 500);
}

// Pictures: dropped, pasted or chosen.
async function searchWith(file) {
  say("Sending the picture …");
  try {
    const response = await fetch("/pictures", { method: "POST", body: file });
    const answer = await response.json();
    if (answer.error) return say(answer.error, true);
    const asked = new URLSearchParams(location.search);
    asked.delete("labels");
    if (asked.get("space") === "corrected") asked.delete("space");
    if (!asked.get("q")) asked.delete("picture");
    asked.append("picture", answer.picture);
    await show(`/?${asked}`);
  } catch {
    say("The picture could not be sent.", true);
  }
}

const pictureOf = (items) => [...(items?.files ?? [])].find((file) => file.type.startsWith("image/"));
addEventListener("dragover", (event) => {
  if (![...event.dataTransfer.types].includes("Files")) return;
  event.preventDefault();
  byId("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").hidden = true;
});
addEventListener("drop", (event) => {
  if (![...event.dataTransfer.types].includes("Files")) return;
  event.preventDefault();
  byId("drop").hidden = true;
  const file = pictureOf(event.dataTransfer);
  if (file) searchWith(file);
  else say("Only files of pictures can be dropped here.", true);
});
addEventListener("paste", (event) => {
  const file = pictureOf(event.clipboardData);
  if (!file) return;
  event.preventDefault();
  searchWith(file);
});

// Links and forms of this page load in place.
addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href='/'], a[href^='/?']");
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  show(link.getAttribute("href"));
});
addEventListener("submit", (event) => {
  event.preventDefault();
  const asked = new URLSearchParams();
  for (const [name, value] of new FormData(event.target)) {
    const isDefault = name === "count" && value === "24";
    if (typeof value === "string" && value.trim() && !isDefault) asked.append(name, value.trim());
  }
  show(`/?${asked}`.replace(/\?$/, ""));
});
addEventListener("change", (event) => {
  if (event.target.id === "file" && event.target.files[0]) searchWith(event.target.files[0]);
  else if (event.target.matches(".mark")) mark(event.target.value, event.target.checked);
  else if (event.target.matches("#search select, #search [type=checkbox], #search input[list]") && byId("q").form) {
    const form = byId("search");
    if (byId("q").value.trim() || form.elements.picture) form.requestSubmit();
  }
});
addEventListener("popstate", () => show(location.pathname + location.search, "none"));
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.closest?.("input, select, textarea")) return;
  event.preventDefault();
  byId("q").focus();
  byId("q").select();
});

// Marks are kept in this browser, for these stores.
const shelf = `sail-marks ${document.body.dataset.store}`;
function readMarks() {
  try {
    const found = JSON.parse(localStorage.getItem(shelf) ?? "[]");
    return new Set(Array.isArray(found) ? found.filter((key) => typeof key === "string") : []);
  } catch {
    return new Set();
  }
}
let marks = readMarks();

function mark(key, isOn) {
  marks = readMarks();
  if (isOn) marks.add(key);
  else marks.delete(key);
  storeMarks();
}

function storeMarks() {
  try {
    localStorage.setItem(shelf, JSON.stringify([...marks]));
  } catch {
    // Without storage, marks last as long as the page.
  }
  showMarks();
}

function showMarks() {
  for (const box of document.querySelectorAll(".mark")) box.checked = marks.has(box.value);
  byId("marks").hidden = marks.size === 0;
  byId("marked").textContent = `${marks.size} marked`;
}

byId("clear").addEventListener("click", () => {
  marks.clear();
  storeMarks();
});
byId("save").addEventListener("click", () => {
  const keys = [...marks].filter((key) => !/[\t\n\r]/.test(key));
  if (keys.length < marks.size) say("Keys with tabs or line breaks cannot be listed, and are left out.", true);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([keys.map((key) => `${key}\n`).join("")], { type: "text/plain" }));
  link.download = "exclude.txt";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});
addEventListener("storage", () => {
  marks = readMarks();
  showMarks();
});
begin();
