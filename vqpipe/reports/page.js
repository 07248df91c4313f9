"use strict";

// ---- Cards: a slider between an original and one of its versions ----

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

const element = (tag, name, text = "") => {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
};

const makeButton = (name, text, act) => {
  const made = element("button", name, text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
};

// The percentage of a slider after a key; null for a key that does not move it.
const percentAfter = (key, percent, shift) => {
  const step = shift ? 10 : 2;
  const to = { ArrowLeft: percent - step, ArrowDown: percent - step, ArrowRight: percent + step, ArrowUp: percent + step,
               PageDown: percent - 10, PageUp: percent + 10, Home: 0, End: 100 }[key];
  return to === undefined ? null : clamp(to, 0, 100);
};

const setValue = (slider, percent, label) => {
  slider.setAttribute("aria-valuenow", Math.round(percent));
  slider.setAttribute("aria-valuetext", `${Math.round(percent)} % original, the rest ${label}`);
};

class Card {
  constructor(node) {
    this.node = node;
    this.name = node.getAttribute("aria-label");
    this.original = node.querySelector(".original");
    this.versions = [...node.querySelectorAll(".version")];
    this.chosen = 0;
    this.percent = 50;
    this.versions.forEach((button, number) => button.addEventListener("click", () => this.choose(number)));
    this.frame = element("div", "frame");
    node.prepend(this.frame);
    node.card = this;
    this.choose(0);
  }

  // Add the two large pictures: after the page has loaded, so that a page of many pictures opens at once.
  fill() {
    if (this.slide || !this.versions.length) return;
    this.slide = element("div", "slide");
    this.slide.tabIndex = 0;
    for (const [name, value] of [["role", "slider"], ["aria-valuemin", 0], ["aria-valuemax", 100],
                                 ["aria-label", `${this.name}: share of the original`]])
      this.slide.setAttribute(name, value);
    this.after = element("img", "after");
    this.before = element("img", "before");
    this.before.src = this.original.src;
    this.before.alt = this.original.alt;
    this.slide.append(this.after, this.before, element("i", "line"));
    this.tag = element("span", "tag right");
    const enlarge = makeButton("enlarge", "\u2922", () => large.show(this));
    enlarge.tabIndex = -1;  // Enter on the slider does the same
    enlarge.setAttribute("aria-label", `Enlarge ${this.name}`);
    this.frame.append(this.slide, element("span", "tag left", "original"), this.tag, enlarge);
    this.listen();
    this.choose(this.chosen);
    this.slideTo(this.percent);
    this.frame.classList.toggle("pixels", this.frame.clientWidth >= 2 * this.original.naturalWidth);
  }

  listen() {
    const slide = this.slide;
    let from = null, dragged = false;
    const follow = (event) => {
      const box = slide.getBoundingClientRect();
      this.slideTo(clamp((100 * (event.clientX - box.left)) / box.width, 0, 100));
    };
    slide.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      from = event.clientX;
      dragged = false;
      slide.setPointerCapture(event.pointerId);
    });
    slide.addEventListener("pointermove", (event) => {
      if (from === null) return;
      dragged ||= Math.abs(event.clientX - from) > 4;
      if (dragged) follow(event);
    });
    slide.addEventListener("pointercancel", () => { from = null; });  // the page scrolls instead
    slide.addEventListener("pointerup", () => {
      if (from !== null && !dragged) large.show(this);
      from = null;
    });
    slide.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const to = percentAfter(event.key, this.percent, event.shiftKey);
      if (to !== null) this.slideTo(to);
      else if (event.key === "Enter") large.show(this);
      else return;
      event.preventDefault();
    });
  }

  label() { return this.versions[this.chosen].dataset.label; }

  choose(number) {
    if (!this.versions.length) return;
    this.chosen = number;
    this.versions.forEach((button, each) => button.setAttribute("aria-pressed", String(each === number)));
    this.onchoice?.();
    if (!this.slide) return;
    const picture = this.versions[number].querySelector("img");
    this.after.src = picture.src;
    this.after.alt = picture.alt;
    this.tag.textContent = this.label();
    setValue(this.slide, this.percent, this.label());
  }

  slideTo(percent) {
    this.percent = percent;
    this.frame.style.setProperty("--x", `${percent}%`);
    setValue(this.slide, percent, this.label());
  }
}

// ---- The large view ----

class Large {
  constructor(dialog) {
    this.dialog = dialog;
    for (const name of ["what", "choices", "scale", "field", "sheet", "after", "before", "line", "handle"])
      this[name] = dialog.querySelector(`.${name}`);
    [this.left, this.right] = dialog.querySelectorAll(".tag");
    this.points = new Map();
    this.percent = 50;
    const acts = {
      previous: () => this.go(-1), next: () => this.go(1), in: () => this.zoom(1.5), out: () => this.zoom(1 / 1.5),
      fit: () => this.fit(), pixels: () => this.zoom(1 / this.size), close: () => dialog.close(),
    };
    for (const button of dialog.querySelectorAll("[data-do]")) button.addEventListener("click", acts[button.dataset.do]);
    dialog.addEventListener("keydown", (event) => this.key(event));
    dialog.addEventListener("close", () => this.card.slide.focus());
    this.field.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), event);
    }, { passive: false });
    this.field.addEventListener("dblclick", (event) => this.fitted ? this.zoom(1 / this.size, event) : this.fit());
    this.field.addEventListener("pointerdown", (event) => this.press(event));
    this.field.addEventListener("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointercancel"])
      this.field.addEventListener(name, (event) => this.points.delete(event.pointerId));
    addEventListener("resize", () => { if (dialog.open) this.fitted ? this.fit() : this.draw(); });
  }

  show(card) {
    card.fill();
    this.card = card;
    this.chosen = card.chosen;
    const labels = ["original", ...card.versions.map((button) => button.dataset.label)];
    this.choices.replaceChildren(...labels.map((label, number) => makeButton("", label, () => this.choose(number - 1))));
    this.before.src = card.original.src;
    this.before.alt = card.original.alt;
    this.width = card.original.naturalWidth;
    this.height = card.original.naturalHeight;
    if (!this.dialog.open) {
      this.percent = card.percent;
      this.dialog.showModal();
      this.field.focus();
    }
    this.choose(this.chosen);
    this.fit();
  }

  // Version -1 is the original alone; the others show to the right of the line.
  choose(number) {
    this.chosen = number;
    const version = this.card.versions[number], alone = number < 0;
    if (!alone) {
      const picture = version.querySelector("img");
      this.after.src = picture.src;
      this.after.alt = picture.alt;
      this.card.choose(number);
    }
    this.line.hidden = this.right.hidden = alone;
    this.right.textContent = alone ? "" : version.dataset.label;
    [...this.choices.children].forEach((button, each) => button.setAttribute("aria-pressed", String(each - 1 === number)));
    const notes = [alone ? "" : version.dataset.note, this.card.node.dataset.note].filter(Boolean);
    this.what.replaceChildren(element("b", "", this.card.name), notes.map((note) => ` \u00b7 ${note}`).join(""));
    this.draw();
  }

  go(by) {
    const cards = [...this.card.node.parentElement.children].map((node) => node.card);
    this.show(cards[(cards.indexOf(this.card) + by + cards.length) % cards.length]);
  }

  // One picture pixel is `size` CSS pixels; (x, y) is the sheet's corner in the field.
  fit() {
    const { clientWidth, clientHeight } = this.field;
    this.size = Math.min(clientWidth / this.width, clientHeight / this.height);
    this.x = (clientWidth - this.size * this.width) / 2;
    this.y = (clientHeight - this.size * this.height) / 2;
    this.draw();
    this.fitted = true;
  }

  zoom(factor, at = null) {
    const box = this.field.getBoundingClientRect();
    const [x, y] = at ? [at.clientX - box.left, at.clientY - box.top] : [box.width / 2, box.height / 2];
    const size = clamp(this.size * factor, 0.05, 32);
    this.x = x - ((x - this.x) * size) / this.size;
    this.y = y - ((y - this.y) * size) / this.size;
    this.size = size;
    this.draw();
  }

  move(x, y) {
    this.x += x;
    this.y += y;
    this.draw();
  }

  slideTo(percent) {
    this.percent = clamp(percent, 0, 100);
    this.draw();
  }

  draw() {
    const { clientWidth, clientHeight } = this.field, width = this.size * this.width, height = this.size * this.height;
    this.fitted = false;
    this.x = clamp(this.x, 60 - width, clientWidth - 60);
    this.y = clamp(this.y, 60 - height, clientHeight - 60);
    Object.assign(this.sheet.style, { left: `${this.x}px`, top: `${this.y}px`, width: `${width}px`, height: `${height}px` });
    this.sheet.style.setProperty("--x", `${this.chosen < 0 ? 100 : this.percent}%`);
    this.sheet.classList.toggle("pixels", this.size * devicePixelRatio > 1);
    this.line.style.left = `${clamp(this.x + (width * this.percent) / 100, 0, clientWidth)}px`;
    this.scale.textContent = `${Math.round(100 * this.size)} %`;
    setValue(this.handle, this.percent, this.right.textContent);
  }

  press(event) {
    if (event.button !== 0) return;
    this.field.setPointerCapture(event.pointerId);
    this.points.set(event.pointerId, { x: event.clientX, y: event.clientY, divides: event.target === this.handle });
  }

  drag(event) {
    const point = this.points.get(event.pointerId);
    if (!point) return;
    const others = [...this.points.values()].filter((other) => other !== point);
    if (point.divides) {
      const left = this.field.getBoundingClientRect().left;
      this.slideTo((100 * (event.clientX - left - this.x)) / (this.size * this.width));
    } else if (others.length) {  // two fingers
      const apart = (x, y) => Math.hypot(x - others[0].x, y - others[0].y);
      this.zoom(apart(event.clientX, event.clientY) / Math.max(apart(point.x, point.y), 1),
                { clientX: (event.clientX + others[0].x) / 2, clientY: (event.clientY + others[0].y) / 2 });
    } else this.move(event.clientX - point.x, event.clientY - point.y);
    Object.assign(point, { x: event.clientX, y: event.clientY });
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const percent = event.target === this.handle ? percentAfter(event.key, this.percent, event.shiftKey) : null;
    const arrows = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key];
    if (percent !== null) this.slideTo(percent);
    else if (arrows && event.shiftKey) this.move(...arrows);
    else if (event.key === "ArrowRight" || event.key === "ArrowDown") this.go(1);
    else if (event.key === "ArrowLeft" || event.key === "ArrowUp") this.go(-1);
    else if (event.key === "+" || event.key === "=") this.zoom(1.5);
    else if (event.key === "-") this.zoom(1 / 1.5);
    else if (event.key === "0") this.fit();
    else if (event.key === "1") this.zoom(1 / this.size);
    else if (event.key === " " && event.target.tagName !== "BUTTON")
      this.choose(((this.chosen + 2) % (this.card.versions.length + 1)) - 1);
    else return;
    event.preventDefault();
  }
}

const large = new Large(document.querySelector(".large"));
const FILLED_AT_ONCE = 24;  // cards that are visible first, on a large screen too
const empty = [];
const whenIdle = window.requestIdleCallback || ((work) => setTimeout(work, 1));
const fillNext = () => {
  empty.shift()?.fill();
  if (empty.length) whenIdle(fillNext);
};

for (const gallery of document.querySelectorAll(".gallery")) {
  const cards = [...gallery.querySelectorAll(".card")].map((node) => new Card(node));
  const bar = gallery.querySelector(".bar"), choices = bar.querySelector(".choices");
  const labels = cards.length ? cards[0].versions.map((button) => button.dataset.label) : [];
  const buttons = labels.map((label, number) =>
    makeButton("", label, () => { for (const card of cards) card.choose(number); }));
  choices.append(...buttons);
  for (const card of cards) card.onchoice = () => buttons.forEach((button, number) =>
    button.setAttribute("aria-pressed", String(cards.every((each) => each.chosen === number))));
  cards[0]?.onchoice();
  choices.hidden = labels.length < 2;
  bar.querySelector(".hint").hidden = gallery !== document.querySelector(".gallery");  // once a page
  bar.hidden = !labels.length;
  empty.push(...cards);
}
for (const card of empty.splice(0, FILLED_AT_ONCE)) card.fill();
fillNext();

// ---- Copy buttons and the color theme ----

// A page opened as a file may have no clipboard access: then select the text and copy the selection.
const copy = async (code) => {
  try {
    await navigator.clipboard.writeText(code.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(code);
    return document.execCommand("copy");
  }
};

for (const command of document.querySelectorAll(".command")) {
  const button = command.querySelector(".copy");
  button.hidden = false;
  button.setAttribute("aria-live", "polite");
  button.addEventListener("click", async () => {
    button.textContent = (await copy(command.querySelector("code"))) ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}

const theme = document.querySelector(".theme"), themes = ["", "dark", "light"];
const paint = (name) => {
  document.documentElement.dataset.theme = name;
  theme.textContent = `Theme: ${name || "auto"}`;
  theme.setAttribute("aria-label", `Color theme: ${name || "system"}`);
};
theme.hidden = false;
theme.addEventListener("click", () => paint(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]));
paint("");

// ---- The page of a running job: it loads itself again, and keeps the reader's place ----

const reloadSeconds = Number(document.body.dataset.reload || 0), placeKey = `place: ${document.title}`;
const titleOf = (node) => node.closest("section")?.querySelector("h2").textContent ?? "";
const cardsByName = () => [...document.querySelectorAll(".card")].map((node) => [`${titleOf(node)}/${node.card.name}`, node.card]);
const folds = () => [...document.querySelectorAll("details")].map((node) => [titleOf(node), node]);

const readPlace = () => {
  const headings = [...document.querySelectorAll("h1, h2")];
  const above = headings.filter((node) => node.getBoundingClientRect().top <= 1).pop() ?? headings[0];
  return {
    theme: document.documentElement.dataset.theme,
    heading: above.textContent, top: above.getBoundingClientRect().top, left: scrollX,
    folds: folds().map(([name, node]) => [name, node.open]),
    cards: cardsByName().map(([name, card]) => [name, [card.label(), card.percent]]),
  };
};

const restorePlace = (place) => {
  if (place.theme) paint(place.theme);
  const open = new Map(place.folds), chosen = new Map(place.cards);
  for (const [name, node] of folds()) if (open.has(name)) node.open = open.get(name);
  for (const [name, card] of cardsByName()) {
    if (!chosen.has(name)) continue;
    const [label, percent] = chosen.get(name);
    const number = card.versions.findIndex((button) => button.dataset.label === label);
    card.choose(Math.max(0, number));
    if (card.slide) card.slideTo(percent);
    card.percent = percent;
  }
  const heading = [...document.querySelectorAll("h1, h2")].find((node) => node.textContent === place.heading);
  if (!heading) return;
  const top = scrollY + heading.getBoundingClientRect().top - place.top;
  scrollTo({ left: place.left, top, behavior: "instant" });
};

// Storage may be forbidden.
const storage = (act) => { try { return act(sessionStorage); } catch { return null; } };

const saved = storage((store) => store.getItem(placeKey));
storage((store) => store.removeItem(placeKey));
if (saved) restorePlace(JSON.parse(saved));

if (reloadSeconds) {
  history.scrollRestoration = "manual";
  addEventListener("pagehide", () => storage((store) => store.setItem(placeKey, JSON.stringify(readPlace()))));
  // Not while the reader looks closely, selects text, or is elsewhere.
  const busy = () => document.hidden || large.dialog.open || !getSelection().isCollapsed || document.querySelector(".slide:active");
  let seconds = 0;
  const again = () => {
    seconds += 1;
    if (seconds < reloadSeconds || busy()) return;
    clearInterval(timer);
    // When the run is published, its folder is renamed: then the page is there, and no longer here.
    const home = `../${document.body.dataset.successor}`, probe = document.createElement("script");
    probe.addEventListener("load", () => location.replace(`${home}/report.html`));
    probe.addEventListener("error", () => location.reload());
    probe.src = `${home}/manifest.json`;
    document.head.append(probe);
  };
  const timer = setInterval(again, 1000);
}

// ---- On a phone the list of sections is folded ----

if (matchMedia("(max-width: 40rem)").matches) {
  document.querySelector("nav details")?.removeAttribute("open");
}
