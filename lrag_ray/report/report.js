"use strict";
// Comfort only: choice of duration, search in prompts, and play, pause and seek of all videos of a prompt together.
(() => {
  const AHEAD_S = 0.12; // Videos of a row further apart than this are pulled together.
  const rows = [...document.querySelectorAll(".row")].map(setUpRow);
  const choices = [...document.querySelectorAll('input[name="duration"]')];
  const toolbar = document.querySelector(".toolbar");
  if (toolbar) toolbar.hidden = false;

  for (const choice of choices) {
    choice.addEventListener("change", () => rows.forEach((row) => row.choose(choice.value)));
  }
  const chosen = choices.find((choice) => choice.checked);
  rows.forEach((row) => row.choose(chosen ? chosen.value : ""));

  const search = document.querySelector(".search");
  const found = document.querySelector(".found");
  if (search) search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const shows = words.every((word) => row.text.includes(word));
      row.show(shows);
      count += shows;
    }
    found.textContent = words.length ? `${count} of ${rows.length}` : "";
  });

  // Pages hold hundreds of videos: fetch the first frame of those that come near the window only.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      entry.target.preload = "metadata";
      near.unobserve(entry.target);
    }
  }, { rootMargin: "400px" });
  document.querySelectorAll(".row video").forEach((video) => near.observe(video));

  function setUpRow(element) {
    const transport = element.querySelector(".transport");
    const button = element.querySelector(".play");
    const seek = element.querySelector(".seek");
    const time = element.querySelector(".time");
    const tracks = [...element.querySelectorAll("video")].map((video) => ({
      video,
      missing: video.parentElement.querySelector(".missing"),
      absent: video.parentElement.querySelector(".missing").textContent,
      sources: JSON.parse(video.dataset.sources),
      seconds: JSON.parse(video.dataset.seconds),
      end: 0,
    }));
    let shown = [];
    let length = 0;
    let playing = false;
    let untouched = true;

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
    seek.addEventListener("input", () => {
      untouched = false;
      moveTo(Number(seek.value));
    });

    function choose(frames) {
      stop();
      for (const track of tracks) {
        const source = track.sources[frames];
        track.video.hidden = !source;
        track.end = track.seconds[frames] || 0;
        if (source && track.video.getAttribute("src") !== source) track.video.src = source;
        const broken = source && track.video.error; // Another source has taken back what was wrong with the last one.
        if (!broken) track.missing.textContent = track.absent;
        track.missing.hidden = Boolean(source) && !broken;
      }
      shown = tracks.filter((track) => !track.video.hidden);
      length = Math.max(0, ...shown.map((track) => track.end));
      seek.max = length;
      transport.hidden = shown.length === 0;
      // A frame from inside says more than the first one; the slider shows where it is from.
      moveTo(untouched ? length / 3 : Math.min(Number(seek.value), length));
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
    }

    function show(seconds) {
      seek.value = seconds;
      time.textContent = `${seconds.toFixed(1)} of ${length.toFixed(1)} s`;
      seek.setAttribute("aria-valuetext", time.textContent);
    }

    const text = element.querySelector(".head").textContent.toLowerCase();
    const setShown = (shows) => {
      if (!shows) stop();
      element.hidden = !shows;
    };
    return { choose, text, show: setShown };
  }
})();
