// The page of votes: shows what /state says, sends what is chosen, and sends it again while the server is away.
"use strict";

const element = (id) => document.getElementById(id);
const RETRY_MS = 1000;
const SIDES = [256, 512, 1024, 2048]; // that images can be had in

let state = null;
let busy = true; // until what is shown can be judged
let ranked = []; // places, best first

function trouble(text) {
  element("trouble").textContent = text;
  element("trouble").hidden = !text;
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Asks until there is an answer: the server notes a vote that comes twice once.
async function ask(path, content) {
  for (;;) {
    let response = null;
    try {
      response = await fetch(path, content === undefined ? {} : {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify(content),
      });
      if (response.ok) {
        const answer = await response.json();
        trouble("");
        return answer;
      }
    } catch {
      response = null; // no connection, or it broke off
    }
    if (response && response.status === 401) {
      location.reload();
      return new Promise(() => {});
    }
    if (response && response.status < 500) {
      return ask("/state"); // judged in another window: shows what is to be judged now
    }
    trouble("The server does not answer. Your last choice is kept and sent again; please leave this page open.");
    await pause(RETRY_MS);
  }
}

function address(image, of) {
  const wanted = element("images").clientWidth / Math.min(of, 3) * window.devicePixelRatio;
  const side = SIDES.find((each) => each >= wanted) || SIDES[SIDES.length - 1];
  return `${image}?side=${side}`;
}

// Loads an image that is on the page, and says beside it if it cannot be shown.
function load(shown, url) {
  const failed = document.createElement("span");
  failed.className = "failed";
  shown.after(failed);
  const loaded = new Promise((resolve) => {
    shown.addEventListener("load", resolve);
    shown.addEventListener("error", async () => {
      const answer = await fetch(shown.src).catch(() => null);
      if (answer && answer.status === 404) {
        failed.textContent = "This image cannot be shown. Please skip.";
        resolve();
      } else {
        await pause(RETRY_MS); // the server is away
        shown.src = shown.src;
      }
    });
  });
  shown.src = url;
  return loaded;
}

const letter = (place) => (state.images.length === 2 ? ["left", "right"][place] : `${place + 1}`);

function picture(image, place) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "image";
  const pair = state.images.length === 2;
  button.setAttribute("aria-keyshortcuts", pair ? ["ArrowLeft", "ArrowRight"][place] : `${place + 1}`);
  const shown = document.createElement("img");
  button.append(shown);
  shown.alt = pair ? `${letter(place)} image` : `image ${letter(place)}`;
  shown.draggable = false;
  const label = document.createElement("kbd");
  label.textContent = pair ? ["←", "→"][place] : letter(place);
  const loaded = load(shown, address(image, state.images.length));
  button.append(label);
  button.addEventListener("click", () => choosePlace(place));
  return [button, loaded];
}

// Shows the picture that the images are edits of, where they are edits.
function showOriginal() {
  const original = element("original");
  original.hidden = state.init_image === null;
  if (original.hidden) {
    return Promise.resolve();
  }
  const shown = document.createElement("img");
  shown.alt = "original image";
  shown.draggable = false;
  original.replaceChildren(shown, original.querySelector("figcaption"));
  return load(shown, address(state.init_image, 2));
}

async function show(next) {
  const same = state && next.showing === state.showing;
  state = next;
  ranked = [];
  element("task").hidden = state.showing === null;
  element("done").hidden = state.showing !== null;
  element("undo").disabled = element("undo-last").disabled = state.last === null;
  const rate = state.votes_per_minute === null ? "" : `, ${state.votes_per_minute.toFixed(0)} votes a minute`;
  element("progress").textContent = `${state.done} judged, ${state.left} left${rate}`;
  element("bar").value = state.done / Math.max(state.done + state.left, 1);
  if (state.showing !== null) {
    element("prompt").textContent = state.prompt;
    const count = state.of > 1 ? `${state.number} of ${state.of}: ` : "";
    element("question").textContent = count + state.text;
    if (!same) {
      const original = showOriginal(); // first, as it takes room from the images
      const made = state.images.map(picture);
      element("images").replaceChildren(...made.map(([button]) => button));
      element("images").className = state.images.length === 2 ? "two" : "many";
      await Promise.all([original, ...made.map(([, loaded]) => loaded)]);
    }
    mark();
  }
  document.body.dataset.ready = `${state.showing}/${state.question}`;
  busy = false;
}

function mark() {
  [...element("images").children].forEach((button, place) => {
    const rank = ranked.indexOf(place);
    const label = button.querySelector("kbd");
    if (state.images.length > 2) {
      label.textContent = rank < 0 ? letter(place) : `rank ${rank + 1}`;
    }
    button.classList.toggle("ranked", rank >= 0);
  });
}

async function send(path, content) {
  if (busy) {
    return;
  }
  busy = true;
  await show(await ask(path, content));
}

function choose(choice) {
  if (state.showing !== null) {
    send("/vote", { showing: state.showing, question: state.question, choice });
  }
}

function choosePlace(place) {
  if (busy || state.showing === null) {
    return;
  }
  if (state.images.length === 2) {
    choose(letter(place));
  } else if (place < state.images.length && !ranked.includes(place)) {
    ranked.push(place);
    if (ranked.length === state.images.length - 1) {
      ranked.push(state.images.findIndex((_, other) => !ranked.includes(other)));
      choose(ranked);
    } else {
      mark();
    }
  }
}

function undo() {
  if (busy) {
    return;
  }
  if (ranked.length) {
    ranked.pop();
    mark();
  } else if (state.last !== null) {
    send("/undo", { vote: state.last });
  }
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || state === null) {
    return;
  }
  if (event.key === " " && event.target.closest("button")) {
    return; // a button that was reached by the Tab key
  }
  const pair = state.showing !== null && state.images.length === 2;
  const act = {
    ArrowLeft: () => pair && choosePlace(0),
    ArrowRight: () => pair && choosePlace(1),
    ArrowDown: () => choose("tie"),
    " ": () => choose("skip"),
    z: undo,
    Z: undo,
  }[event.key] || (/^[1-9]$/.test(event.key) && !pair ? () => choosePlace(Number(event.key) - 1) : null);
  if (act) {
    event.preventDefault(); // the page does not scroll
    act();
  }
});

document.addEventListener("click", (event) => {
  if (event.detail > 0 && event.target.closest("button")) {
    event.target.closest("button").blur(); // after a click by a pointer the space bar skips
  }
});

element("tie").addEventListener("click", () => choose("tie"));
element("skip").addEventListener("click", () => choose("skip"));
element("undo").addEventListener("click", undo);
element("undo-last").addEventListener("click", undo);
ask("/state").then(show);
