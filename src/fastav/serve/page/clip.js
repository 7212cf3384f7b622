// The clip: dropped, chosen, recorded or an example.
//
// A chosen clip is {fileId, name, kind, url, seconds, questions}; `url` is a blob URL, which plays it without the server.

import * as api from "./api.js";
import { at, make, say } from "./dom.js";
import { Recorder, whyNotRecord } from "./recorder.js";

const { format } = globalThis.FastavViewer;
const PLAYERS = { video: "video", audio: "audio", image: "image" };

export class ClipChooser {
  /** onChange: called with the clip when it is there. onError: called with an error; true if it was dealt with. */
  constructor(onChange, onError) {
    this.onChange = onChange;
    this.onError = onError;
    this.limits = {};
    this.clip = null;
    this.work = null; // the AbortController of an upload
    this.recorder = null;
    at("file").addEventListener("change", (event) => {
      if (event.target.files.length) this.take(event.target.files[0]);
      event.target.value = ""; // so that the same file can be chosen again
    });
    at("record").addEventListener("click", () => this._record());
    at("video").addEventListener(
      "error",
      () =>
        this.clip &&
        !at("video").hidden &&
        say(at("clip-error"), "This browser cannot play the clip; the server may be able to read it."),
    );
    this._listenForDrops();
  }

  _listenForDrops() {
    const area = at("clip");
    const has = (event) => [...event.dataTransfer.types].includes("Files");
    for (const name of ["dragenter", "dragover"]) {
      document.addEventListener(name, (event) => {
        if (!has(event)) return;
        event.preventDefault(); // else the browser opens the file in place of the page
        area.classList.add("over");
      });
    }
    document.addEventListener("dragleave", (event) => event.relatedTarget || area.classList.remove("over"));
    document.addEventListener("drop", (event) => {
      area.classList.remove("over");
      if (!has(event)) return;
      event.preventDefault();
      if (event.dataTransfer.files.length) this.take(event.dataTransfer.files[0]);
    });
  }

  setLimits({ limits, supports_audio: audio, supports_images: images }) {
    this.limits = limits || {};
    const kinds = ["video", ...(audio ? ["sound"] : []), ...(images ? ["picture"] : [])];
    at("file").accept = ["video/*", ...(audio ? ["audio/*"] : []), ...(images ? ["image/*"] : [])].join(",");
    const parts = [kinds.join(" or ")];
    if (this.limits.media_seconds) parts.push(`up to ${format.moment(this.limits.media_seconds)}`);
    if (this.limits.body_bytes) parts.push(`${format.bytes(this.limits.body_bytes)} at most`);
    at("clip-limits").textContent = parts.join(", ");
  }

  offerExamples(examples) {
    at("examples-block").hidden = !examples.length;
    at("examples").replaceChildren(
      ...examples.map((example) => {
        const facts =
          typeof example.seconds === "number" ? make("small", {}, ` ${format.moment(example.seconds)}`) : "";
        const button = make("button", { type: "button" }, example.name, facts);
        button.dataset.example = example.id;
        button.addEventListener("click", () => this._takeExample(example));
        return make("li", {}, button);
      }),
    );
  }

  async _takeExample(example) {
    await this._while(`Loading ${example.name}`, async () => {
      const url = URL.createObjectURL(await api.exampleBytes(example.id));
      return {
        fileId: example.id,
        name: example.name,
        kind: example.kind,
        url,
        seconds: example.seconds,
        questions: example.questions || [],
      };
    });
  }

  /** Upload a file of the reader's. */
  async take(file) {
    const { body_bytes: most } = this.limits;
    if (most && file.size > most) {
      say(
        at("clip-error"),
        `${file.name} has ${format.bytes(file.size)}; this server takes ${format.bytes(most)} at most.`,
      );
      return;
    }
    await this._while(`Uploading ${file.name}`, async (signal) => {
      const stored = await api.upload(file, (share) => this._progress(share, file.name), signal);
      const kind = file.type.startsWith("image/") ? "image" : file.type.startsWith("audio/") ? "audio" : "video";
      return { fileId: stored.id, name: file.name, kind, url: URL.createObjectURL(file), seconds: null, questions: [] };
    });
  }

  /** Do work that gives a clip, with a progress bar; work that was under way before is given up. */
  async _while(doing, work) {
    if (this.work) this.work.abort();
    const mine = (this.work = new AbortController());
    say(at("clip-error"), "");
    at("upload").hidden = false;
    at("progress").removeAttribute("value");
    at("progress-text").textContent = `${doing}…`;
    try {
      const clip = await work(mine.signal);
      if (this.work === mine) this.show(clip);
    } catch (error) {
      if (error.name !== "AbortError" && !this.onError(error)) say(at("clip-error"), error.message);
    } finally {
      if (this.work === mine) {
        at("upload").hidden = true;
        this.work = null;
      }
    }
  }

  _progress(share, name) {
    at("progress").value = share;
    at("progress-text").textContent =
      share < 1 ? `Uploading ${name}, ${format.share(share)}` : `The server stores ${name}…`;
  }

  get busy() {
    return this.work !== null || this.recorder !== null;
  }

  show(clip) {
    this.clip = clip;
    at("clip-empty").hidden = true;
    for (const [kind, id] of Object.entries(PLAYERS)) {
      const player = at(id);
      player.hidden = clip.kind !== kind;
      player.srcObject = null;
      if (clip.kind === kind) player.src = clip.url;
      else player.removeAttribute("src");
    }
    at("clip-name").textContent = clip.seconds ? `${clip.name} · ${format.moment(clip.seconds)}` : clip.name;
    for (const button of at("examples").querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(button.dataset.example === clip.fileId));
    this.onChange(clip);
  }

  async _record() {
    if (this.recorder) {
      this.recorder.stop();
      return;
    }
    const obstacle = whyNotRecord();
    say(at("clip-error"), obstacle);
    if (obstacle) return;
    this.recorder = new Recorder(
      at("video"),
      this.limits.media_seconds || 60,
      (second) => (at("record-text").textContent = `Stop, ${format.moment(second)}`),
    );
    at("record").classList.add("on");
    at("clip-empty").hidden = true;
    try {
      const file = await this.recorder.file();
      await this.take(file);
    } catch (error) {
      say(at("clip-error"), error.message);
      if (this.clip) this.show(this.clip);
      else [at("clip-empty").hidden, at("video").hidden] = [false, true];
    } finally {
      this.recorder = null;
      at("record").classList.remove("on");
      at("record-text").textContent = "Record";
    }
  }
}
