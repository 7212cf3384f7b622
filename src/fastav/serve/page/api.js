// Requests to the server that this page came from.

const KEY = "fastav-key"; // in the tab's session storage

/** An answer of the server that is no success, as one sentence. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let key = "";
try {
  key = sessionStorage.getItem(KEY) || "";
} catch {
  // storage is switched off: the key lasts as long as the page
}

export function useKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // as above
  }
}

const headers = (more = {}) => (key ? { ...more, Authorization: `Bearer ${key}` } : more);

/** The sentence of an error's body, which may not be JSON if a proxy sent it. */
function sentence(status, body, retryAfter) {
  let message = "";
  try {
    const { error, detail } = JSON.parse(body);
    message = (error && error.message) || (typeof detail === "string" ? detail : "");
  } catch {
    // no JSON
  }
  message ||= `The server answered with status ${status}.`;
  return retryAfter && (status === 429 || status === 503) ? `${message} Try again in ${retryAfter} s.` : message;
}

async function send(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer. Check that fastav serve is still running.");
  }
  if (!response.ok) {
    throw new ServerError(
      response.status,
      sentence(response.status, await response.text(), response.headers.get("Retry-After")),
    );
  }
  return response;
}

const post = (path, body, signal) =>
  send(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

export const models = async () => (await (await send("/v1/models")).json()).data;
export const examples = async () => (await (await send("/v1/examples")).json()).data;
export const exampleBytes = async (id) => (await send(`/v1/examples/${encodeURIComponent(id)}`)).blob();
export const reportTemplate = async () => (await send("/static/report.html")).text();
export const inspect = async (body, signal) => (await post("/v1/inspect", body, signal)).json();

/** Upload a file; `onProgress` gets shares in [0, 1]. With XMLHttpRequest, because fetch tells no progress. */
export function upload(file, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(),
      form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", file, file.name);
    request.open("POST", "/v1/files");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener(
      "progress",
      (event) => event.lengthComputable && onProgress(event.loaded / event.total),
    );
    request.addEventListener("load", () => {
      if (request.status >= 200 && request.status < 300) resolve(JSON.parse(request.responseText));
      else
        reject(
          new ServerError(
            request.status,
            sentence(request.status, request.responseText, request.getResponseHeader("Retry-After")),
          ),
        );
    });
    request.addEventListener("error", () =>
      reject(
        new ServerError(
          0,
          "The upload failed. Check that fastav serve is still running and that the file is not too large.",
        ),
      ),
    );
    request.addEventListener("abort", () => reject(new DOMException("aborted", "AbortError")));
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

/** The data of server-sent events, one after another. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value.replaceAll("\r", "");
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block
        .split("\n")
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}

/** Ask, and hand over the text piece by piece; returns the usage of the last chunk.
 *
 * Throws ServerError also if the stream ends before the server said that it is complete.
 */
export async function chat(body, { signal, onText }) {
  const response = await post(
    "/v1/chat/completions",
    { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  );
  let usage = null,
    complete = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      complete = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(response.status, chunk.error.message);
    const piece = chunk.choices && chunk.choices[0] && chunk.choices[0].delta && chunk.choices[0].delta.content;
    if (piece) onText(piece);
    if (chunk.usage) usage = chunk.usage;
  }
  if (!complete) throw new ServerError(0, "The answer broke off, because the connection to the server ended.");
  return usage;
}
