"use strict";
// Comfort only: filters, order and permalinks; play, pause and seek of all videos of a prompt together; reading the
// retrieval maps. Without it all tables, videos, scores and links are there.
(() => {
  const AHEAD_S = 0.12; // Videos of a row further apart than this are pulled together.
  const section = document.querySelector("#videos");
  if (!section) return;
  const toolbar = section.querySelector(".toolbar");
  const rows = [...section.querySelectorAll(".row")].map(setUpRow);
  const control = (name) => toolbar.querySelector(`[name="${name}"]`);
  const chosen = (name) => [...toolbar.querySelectorAll(`[name="${name}"]:checked`)].map((input) => input.value);
  const search = toolbar.querySelector(".search");
  const found = toolbar.querySelector(".found");

  toolbar.hidden = false;
  for (const element of section.querySelectorAll(".scripted")) element.hidden = false;
  toolbar.addEventListener("change", (event) => {
    if (["duration", "method"].includes(event.target.name)) choose();
    else filter();
    if (["duration", "order", "one", "other", "measure"].includes(event.target.name)) order();
  });
  search.addEventListener("input", filter);
  choose();
  openLink();
  window.addEventListener("hashchange", openLink);

  // Pages hold hundreds of videos: fetch one frame of those that come near the window only, and what was retrieved for
  // it once they are seen.
  const once = (margin, elements, act) => {
    const observer = new IntersectionObserver((entries) => {
      for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
        act(target);
        observer.unobserve(target);
      }
    }, { rootMargin: margin });
    elements.forEach((element) => observer.observe(element));
  };
  once("400px", section.querySelectorAll(".row video"), (video) => { video.preload = "metadata"; });
  once("0px", rows.map((row) => row.element), (element) => rows.find((row) => row.element === element).rest());

  function choose() {
    const [duration] = chosen("duration");
    const methods = control("method") && new Set(chosen("method"));
    for (const row of rows) row.choose(duration || "", methods);
  }

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const backbone = control("backbone") ? control("backbone").value : "";
    let count = 0;
    for (const row of rows) {
      const shows = words.every((word) => row.text.includes(word)) && (!backbone || row.backbone === backbone);
      row.show(shows);
      count += shows;
    }
    found.textContent = words.length || backbone ? `${count} of ${rows.length}` : "";
  }

  function order() {
    if (!control("order")) return;
    const direction = Number(control("order").value);
    const [one, other] = [control("one").value, control("other").value];
    const measure = control("measure").selectedOptions[0];
    const gaps = new Map(rows.map((row) => {
      const [a, b] = [one, other].map((method) => row.value(method, measure.value));
      return [row, a === null || b === null ? null : a - b];
    }));
    for (const [row, gap] of gaps) {
      const amount = gap === null ? "no pair of scores" : signed(gap * Number(measure.dataset.scale));
      row.tell(direction ? `${one} − ${other}, ${measure.textContent}: ${amount}` : "");
    }
    const last = (gap) => (gap === null ? -Infinity : direction * Number(measure.dataset.sign) * gap);
    const sorted = direction ? [...rows].sort((a, b) => last(gaps.get(b)) - last(gaps.get(a)) || 0) : rows;
    section.append(...sorted.map((row) => row.element));
  }

  function signed(value) {
    return `${value < 0 ? "−" : "+"}${Number(Math.abs(value).toPrecision(3))}`;
  }

  // A permalink is #ROW&t=SECONDS&d=LATENT_FRAMES.
  function openLink() {
    const [anchor, ...settings] = window.location.hash.slice(1).split("&");
    let name = anchor;
    try { name = decodeURIComponent(anchor); } catch { return; }
    const row = rows.find(({ element }) => element.id === name);
    if (!row || !settings.length) return;
    const values = new URLSearchParams(settings.join("&"));
    const duration = [...toolbar.querySelectorAll('[name="duration"]')].find((input) => input.value === values.get("d"));
    if (duration && !duration.checked) {
      duration.checked = true;
      choose();
    }
    const seconds = Number(values.get("t"));
    if (Number.isFinite(seconds)) row.seekTo(seconds);
    row.element.scrollIntoView();
    // Videos and pictures above take their room when they have loaded.
    window.addEventListener("load", () => row.element.scrollIntoView(), { once: true });
  }

  function setUpRow(element) {
    const transport = element.querySelector(".transport");
    const button = element.querySelector(".play");
    const seek = element.querySelector(".seek");
    const time = element.querySelector(".time");
    const gap = element.querySelector(".gap");
    const permalink = element.querySelector(".permalink");
    const players = [...element.querySelectorAll(".player")];
    const maps = players.map((player) => setUpMap(player, (seconds) => seekTo(seconds))).filter(Boolean);
    const tracks = players.filter((player) => player.querySelector("video")).map((player) => {
      const video = player.querySelector("video");
      const missing = player.querySelector(".screen .missing");
      return {
        player,
        video,
        missing,
        absent: missing.textContent,
        sources: JSON.parse(video.dataset.sources),
        seconds: JSON.parse(video.dataset.seconds),
        end: 0,
      };
    });
    let shown = [];
    let length = 0;
    let playing = false;
    let untouched = true;
    let duration = "";
    let settled = 0;

    transport.hidden = false;
    for (const { video, missing } of tracks) {
      video.controls = false;
      video.addEventListener("error", () => {
        missing.textContent = "cannot be played: missing or damaged";
        missing.hidden = false;
      });
      video.addEventListener("click", toggle);
      video.addEventListener("loadedmetadata", () => {
        video.closest(".players").style.setProperty("--aspect", `${video.videoWidth} / ${video.videoHeight}`);
      });
    }
    button.addEventListener("click", toggle);
    seek.addEventListener("input", () => seekTo(Number(seek.value)));

    function choose(frames, methods) {
      stop();
      duration = frames;
      for (const player of players) {
        player.hidden = Boolean(methods) && !methods.has(player.dataset.method);
        for (const list of player.querySelectorAll(".scores")) list.hidden = list.dataset.frames !== frames;
      }
      for (const track of tracks) {
        const source = track.sources[frames];
        track.video.hidden = !source;
        track.end = track.seconds[frames] || 0;
        if (source && track.video.getAttribute("src") !== source) track.video.src = source;
        for (const link of track.player.querySelectorAll(".file")) if (source) link.href = source;
        const broken = source && track.video.error; // Another source has taken back what was wrong with the last one.
        if (!broken) track.missing.textContent = track.absent;
        track.missing.hidden = Boolean(source) && !broken;
      }
      shown = tracks.filter(({ video, player }) => !video.hidden && !player.hidden);
      length = Math.max(0, ...shown.map((track) => track.end));
      seek.max = length;
      transport.hidden = shown.length === 0;
      // A late frame says most of what a method keeps; the slider shows where it is from.
      moveTo(untouched ? 0.75 * length : Math.min(Number(seek.value), length));
    }

    function seekTo(seconds) {
      untouched = false;
      moveTo(Math.min(Math.max(seconds, 0), length));
    }

    function toggle() {
      if (playing) return stop();
      if (untouched || Number(seek.value) >= length - 0.05) moveTo(0);
      untouched = false;
      playing = true;
      button.textContent = "Pause";
      for (const { video } of shown) video.play().catch(() => {}); // An unplayable file stays still; the others go on.
      requestAnimationFrame(follow);
    }

    function stop() {
      if (playing) settle(Number(seek.value));
      playing = false;
      button.textContent = "Play";
      for (const { video } of tracks) video.pause();
    }

    function follow() {
      if (!playing) return;
      const running = shown.filter(({ video, end }) => !video.ended && !video.error && video.currentTime < end);
      if (running.length === 0) {
        show(length);
        return stop();
      }
      // The slowest leads: one that has to wait for data makes the others wait instead of being left behind.
      const now = Math.min(...running.map(({ video }) => video.currentTime));
      for (const { video, end } of shown) {
        if (video.currentTime >= end) video.pause();
        else if (video.currentTime - now > AHEAD_S) video.currentTime = now;
      }
      show(now);
      requestAnimationFrame(follow);
    }

    function moveTo(seconds) {
      for (const { video, end } of shown) {
        const target = Math.min(seconds, end);
        if (Math.abs(video.currentTime - target) > 0.01) video.currentTime = target;
        if (playing && target < end) video.play().catch(() => {});
      }
      show(seconds);
      if (!untouched && !playing) settle(seconds);
    }

    function show(seconds) {
      seek.value = seconds;
      time.textContent = `${seconds.toFixed(1)} of ${length.toFixed(1)} s`;
      seek.setAttribute("aria-valuetext", time.textContent);
      permalink.href = `#${encodeURIComponent(element.id)}&t=${seconds.toFixed(2)}&d=${encodeURIComponent(duration)}`;
      for (const map of maps) map.at(seconds);
    }

    // Retrieved frames are drawn once the position rests: every one of them is a seek.
    function settle(seconds) {
      clearTimeout(settled);
      settled = setTimeout(() => maps.forEach((map) => map.draw(seconds)), 200);
    }

    function value(method, measure) {
      const player = players.find(({ dataset }) => dataset.method === method);
      const lists = player ? [...player.querySelectorAll(".scores")] : [];
      const list = lists.find(({ dataset }) => dataset.frames === duration);
      const cell = list && [...list.querySelectorAll("dd")].find(({ dataset }) => dataset.measure === measure);
      return cell ? Number(cell.dataset.value) : null;
    }

    return {
      element,
      backbone: element.dataset.backbone,
      text: element.querySelector(".head").textContent.toLowerCase(),
      choose,
      seekTo,
      value,
      rest() {
        if (!playing) settle(Number(seek.value));
      },
      show(shows) {
        if (!shows) stop();
        element.hidden = !shows;
      },
      tell(text) {
        gap.textContent = text;
        gap.hidden = !text;
      },
    };
  }

  function setUpMap(player, seekTo) {
    const map = player.querySelector(".attention");
    const video = player.querySelector("video");
    if (!map) return null;
    const field = map.querySelector(".field");
    const playhead = map.querySelector(".playhead");
    const pointed = map.querySelector(".pointed");
    const list = map.querySelector(".frames");
    const [frameS, frames, first, block] =
      ["frameS", "frames", "first", "block"].map((name) => Number(map.dataset[name]));
    const retrieved = JSON.parse(map.dataset.retrieved);
    const length = frames * frameS;
    let probe = null; // A second video that seeks to the retrieved frames.
    let drawing = 0;

    const name = player.querySelector("figcaption").textContent;
    const row = player.closest(".row").querySelector("h3").firstChild.textContent.trim();
    let cursor = 0; // Seconds at which the playhead is; keys move it ahead of the videos.

    playhead.hidden = false;
    field.tabIndex = 0;
    for (const [attribute, value] of Object.entries({
      role: "slider",
      "aria-label": `Retrieval map of ${name}, ${row}. ${field.querySelector("svg").getAttribute("aria-label")} `
        + "Arrow keys move by a block, Enter goes there.",
      "aria-valuemin": 0,
      "aria-valuemax": length.toFixed(2),
    })) field.setAttribute(attribute, value);
    field.addEventListener("keydown", (event) => {
      const step = block * frameS;
      const last = (Math.ceil(frames / block) - 1) * step;
      const here = Math.floor(cursor / step + 1e-6) * step;
      const places = {
        ArrowRight: here + step, ArrowUp: here + step, PageUp: here + 10 * step, End: last,
        ArrowLeft: here - step, ArrowDown: here - step, PageDown: here - 10 * step, Home: 0,
      };
      if (event.key in places) {
        at(Math.min(Math.max(places[event.key], 0), last));
        pointed.textContent = `; ${field.getAttribute("aria-valuetext")}`;
      } else if (event.key === "Enter") seekTo(cursor);
      else return;
      event.preventDefault();
    });
    field.addEventListener("blur", () => { pointed.textContent = ""; });
    field.addEventListener("pointermove", (event) => {
      const box = field.getBoundingClientRect();
      const query = Math.floor((event.clientX - box.left) / box.width * frames);
      const frame = Math.floor((box.bottom - event.clientY) / box.height * (frames - first)) + first;
      if (query < 0 || query >= frames || frame < first || frame >= frames) return;
      const kind = { v: "retrieved or compressed", s: "sink", l: "local window", m: "memory", c: "the block itself" }[
        (event.target.getAttribute("class") || " ")[0]
      ];
      const begins = Math.floor(query / block) * block * frameS;
      const at = frame < 0 ? "many frames" : `${(frame * frameS).toFixed(2)} s`;
      pointed.textContent = `; block at ${begins.toFixed(2)} s: ${at}, ${kind && event.target !== field ? kind : "not attended to"}`;
    });
    field.addEventListener("pointerleave", () => { pointed.textContent = ""; });
    field.addEventListener("click", (event) => {
      const box = field.getBoundingClientRect();
      seekTo((event.clientX - box.left) / box.width * length);
    });

    function at(seconds) {
      cursor = seconds;
      playhead.style.left = `${100 * Math.min(1, seconds / length)}%`;
      const query = Math.min(retrieved.length - 1, Math.floor(seconds / frameS / block + 1e-6));
      const times = (retrieved[query] || []).map((frame) => (frame * frameS).toFixed(2));
      field.setAttribute("aria-valuenow", Math.min(seconds, length).toFixed(2));
      field.setAttribute("aria-valuetext", `block at ${(query * block * frameS).toFixed(2)} s: `
        + (times.length ? `retrieved ${times.join(", ")} s` : "nothing retrieved"));
    }

    async function draw(seconds) {
      const query = Math.min(retrieved.length - 1, Math.floor(seconds / frameS / block));
      const wanted = retrieved[query] || [];
      const turn = ++drawing;
      list.hidden = !wanted.length;
      list.replaceChildren();
      if (!wanted.length || !video || player.hidden) return;
      if (!probe) {
        probe = document.createElement("video");
        probe.muted = true;
        probe.preload = "auto";
      }
      const source = video.getAttribute("src");
      if (probe.getAttribute("src") !== source) {
        probe.src = source;
        if (!(await happens(probe, "loadeddata"))) return;
      }
      const heading = document.createElement("p");
      heading.textContent = `retrieved for the block at ${(query * block * frameS).toFixed(2)} s:`;
      list.append(heading);
      for (const frame of wanted) {
        if (turn !== drawing) return;
        const moment = (frame + 0.5) * frameS;
        if (moment > probe.duration) continue;
        const seeked = happens(probe, "seeked");
        probe.currentTime = moment;
        if (!(await seeked) || turn !== drawing) return;
        const canvas = document.createElement("canvas");
        canvas.width = 96;
        canvas.height = Math.max(1, Math.round(96 * probe.videoHeight / probe.videoWidth));
        canvas.getContext("2d").drawImage(probe, 0, 0, canvas.width, canvas.height);
        const name = document.createElement("figcaption");
        name.textContent = `${(frame * frameS).toFixed(2)} s`;
        const picture = document.createElement("figure");
        picture.append(canvas, name);
        list.append(picture);
      }
    }

    return { at, draw };
  }

  function happens(video, event) {
    return new Promise((resolve) => {
      video.addEventListener(event, () => resolve(true), { once: true });
      video.addEventListener("error", () => resolve(false), { once: true });
    });
  }
})();
