// Search without a server: browsers start no Worker from file://, so there its script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.appendChild(frame);
      this.frame = frame.contentWindow;
      this.frame.document.open();
      this.frame.postToPage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.frame.document.write(
        "<script>var __index = parent.__index; window.postMessage = postToPage;" +
          "window.importScripts = (...urls) => Promise.all(urls.map((src) => new Promise((done, failed) => {" +
          "const script = document.createElement('script'); script.src = src; script.onload = done; script.onerror = failed;" +
          "document.head.appendChild(script); })));</" + "script>" +
          `<script src="${url}"></` + "script>"
      );
      this.frame.document.close();
      this.ready = new Promise((resolve) => this.frame.addEventListener("load", resolve));
    }
    postMessage(data) {
      this.ready.then(() => this.frame.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.frameElement.remove();
    }
  };
}
