// Recording with camera and microphone.

const TYPES = ["video/webm", "video/mp4", "audio/webm", "audio/mp4"];

/** Why this browser cannot record here, as a sentence; empty if it can. */
export function whyNotRecord() {
  if (!globalThis.isSecureContext)
    return "Browsers record only on secure pages: open this page at the address localhost, or over https.";
  if (!navigator.mediaDevices || !globalThis.MediaRecorder)
    return "This browser cannot record. Choose a file in its place.";
  return "";
}

const REASONS = {
  NotAllowedError:
    "The browser was not allowed to use camera and microphone. Allow it in the address bar, then record again.",
  NotFoundError: "No camera or microphone was found. Choose a file in its place.",
  NotReadableError: "Camera or microphone are in use by another program.",
};

/** Camera and microphone, or what there is of them. */
async function openStream() {
  let reason;
  for (const wish of [{ video: { width: 640 }, audio: true }, { audio: true }, { video: { width: 640 } }]) {
    try {
      return await navigator.mediaDevices.getUserMedia(wish);
    } catch (error) {
      reason = error;
      if (error.name !== "NotFoundError") break;
    }
  }
  throw new Error(REASONS[reason.name] || `Recording failed: ${reason.message}`);
}

export class Recorder {
  /** player: shows what the camera sees. longest: seconds. onSecond: called with the seconds so far. */
  constructor(player, longest, onSecond) {
    this.player = player;
    this.longest = longest;
    this.onSecond = onSecond;
    this.recorder = null;
    this.stopped = false;
  }

  /** Record until `stop`, or as long as the server takes; returns the file. */
  async file() {
    const stream = await openStream();
    const sees = stream.getVideoTracks().length > 0;
    const type = TYPES.find((type) => type.startsWith(sees ? "video" : "audio") && MediaRecorder.isTypeSupported(type));
    this.recorder = new MediaRecorder(stream, type ? { mimeType: type } : {});
    this._preview(stream, sees);
    try {
      const chunks = await this._chunks();
      const kind = this.recorder.mimeType.split(";")[0];
      return new File(chunks, `recording.${kind.split("/")[1] || "webm"}`, { type: kind });
    } finally {
      for (const track of stream.getTracks()) track.stop();
      this.player.srcObject = null;
      this.player.muted = false;
    }
  }

  _preview(stream, sees) {
    if (!sees) return;
    this.player.hidden = false;
    this.player.removeAttribute("src");
    this.player.srcObject = stream;
    this.player.muted = true; // else the microphone hears the loudspeaker
    this.player.play().catch(() => {}); // a browser that refuses to play records all the same
  }

  _chunks() {
    return new Promise((resolve, reject) => {
      const chunks = [],
        start = performance.now();
      const timer = setInterval(() => {
        const second = (performance.now() - start) / 1000;
        this.onSecond(second);
        if (second >= this.longest) this.stop();
      }, 200);
      this.recorder.addEventListener("dataavailable", (event) => chunks.push(event.data));
      this.recorder.addEventListener("stop", () => {
        clearInterval(timer);
        resolve(chunks);
      });
      this.recorder.addEventListener("error", () => {
        clearInterval(timer);
        reject(new Error("Recording failed."));
      });
      this.recorder.start();
      if (this.stopped) this.stop();
    });
  }

  stop() {
    this.stopped = true;
    if (this.recorder && this.recorder.state !== "inactive") this.recorder.stop();
  }
}
