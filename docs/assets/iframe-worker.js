/* Browsers start no worker for a page that is opened from disk. There the search runs in a hidden frame instead. */
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.title = "search";
      const script = `window.postMessage = data => parent.postMessage(data, "*");`;
      this.frame.srcdoc = `<script>${script}</` + `script><script src="${new URL(url, location)}"></` + `script>`;
      this.ready = new Promise(done => (this.frame.onload = done));
      this.heard = event => {
        if (event.source === this.frame.contentWindow) {
          this.dispatchEvent(new MessageEvent("message", { data: event.data }));
        }
      };
      addEventListener("message", this.heard);
      if (document.body) document.body.append(this.frame);
      else addEventListener("DOMContentLoaded", () => document.body.append(this.frame));
    }

    postMessage(data) {
      // The frame's own postMessage is what its script answers by; an event reaches it without that.
      this.ready.then(() => {
        const Message = this.frame.contentWindow.MessageEvent;
        this.frame.contentWindow.dispatchEvent(new Message("message", { data }));
      });
    }

    terminate() {
      removeEventListener("message", this.heard);
      this.frame.remove();
    }
  };
}
