// The page: one clip, one question, two plans, and what each of them kept.

import * as api from "./api.js";
import { AnswerCard, costsOf, drawComparison, newAnswer } from "./answers.js";
import { ClipChooser } from "./clip.js";
import { at, download, fillSwitch, make, say } from "./dom.js";
import { PlanPicker, planName } from "./plans.js";
import { curlCode, pythonCode } from "./snippets.js";
import { startTheme } from "./theme.js";

const viewer = globalThis.FastavViewer;
const SIDES = ["left", "right"];
const FEW_QUESTIONS = 6; // of an example, before "more"

let model = null; // an entry of /v1/models
let hasKey = false;
let run = null; // {clip, question, maxTokens, answers: {left, right}, side, layer}: the question that is shown
let work = null; // the AbortController of the question under way
let drawn = null; // what FastavViewer.mount returned, and of which inspection
let language = "python";
const runs = []; // of this page's session, the newest first

const pickers = Object.fromEntries(SIDES.map((side) => [side, new PlanPicker(side, onPlanChange)]));
const cards = Object.fromEntries(SIDES.map((side) => [side, new AnswerCard(at(side), pickers[side])]));
const clips = new ClipChooser(onClip, dealWithKey);

// ------------------------------------------------------------------ start

async function start() {
  say(at("page-error"), "");
  try {
    const models = await api.models();
    if (!models.length) throw new api.ServerError(0, "The server has no model.");
    model = models[0];
    offerModel();
    clips.offerExamples(await api.examples());
  } catch (error) {
    if (!model) at("model").textContent = "";
    if (!dealWithKey(error)) say(at("page-error"), error.message);
  }
}

function offerModel() {
  const { fastav } = model;
  at("model").textContent = [model.id, `${fastav.layers} layers`, fastav.device, fastav.dtype]
    .filter(Boolean)
    .join(" · ");
  document.title = `${model.id} · fastav`;
  for (const element of document.querySelectorAll(".model-id")) element.textContent = model.id;
  at("outgrow-plan").textContent = fastav.default_plan;
  at("version").textContent = `fastav ${fastav.version}`;
  pickers.left.offer(fastav, "none");
  pickers.right.offer(fastav, fastav.default_plan === "none" ? "fastav" : fastav.default_plan);
  if (fastav.limits && fastav.limits.new_tokens) at("max-tokens").max = fastav.limits.new_tokens;
  clips.setLimits(fastav);
  drawCode();
}

/** Ask for the key if that is what an error says; returns whether it was. */
function dealWithKey(error) {
  if (error.status !== 401) return false;
  at("key-form").hidden = false;
  at("key-note").textContent = error.message;
  at("key").focus();
  return true;
}

at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  api.useKey(at("key").value.trim());
  hasKey = true;
  at("key-form").hidden = true;
  await start();
  if (model && at("key-form").hidden) at("question").focus();
});

// ------------------------------------------------------------------ asking

function onClip(clip) {
  offerQuestions(clip.questions, FEW_QUESTIONS);
  if (clip.questions.length && !at("question").value.trim()) at("question").value = clip.questions[0];
  say(at("ask-error"), "");
  drawCode();
}

/** Questions to choose from, the first of them or all. */
function offerQuestions(questions, most) {
  const items = questions.slice(0, most).map((question) => {
    const button = make("button", { type: "button" }, question);
    button.addEventListener("click", () => {
      at("question").value = question;
      drawCode();
      at("question").focus();
    });
    return make("li", {}, button);
  });
  if (questions.length > most) {
    const more = make("button", { type: "button", className: "quiet" }, `${questions.length - most} more`);
    more.addEventListener("click", () => {
      offerQuestions(questions, questions.length);
      at("suggestions").querySelectorAll("button")[most].focus();
    });
    items.push(make("li", {}, more));
  }
  at("suggestions").replaceChildren(...items);
}

function onPlanChange() {
  for (const side of SIDES) if (run) cards[side].drawPlan(run.answers[side]);
  drawCode();
}

/** The body of a request for one side of a run. */
function bodyOf({ clip, question, maxTokens }, plan) {
  const content = [
    { type: "file", file: { file_id: clip.fileId } },
    { type: "text", text: question },
  ];
  return {
    model: model.id,
    messages: [{ role: "user", content }],
    max_tokens: maxTokens,
    temperature: 0,
    fastav: plan,
  };
}

/** The run that the form describes; throws an Error whose message is for the reader. */
function runFromForm() {
  if (!model) throw new Error("The server did not tell its model yet.");
  if (clips.busy) throw new Error("Wait until the clip is there.");
  if (!clips.clip) throw new Error("Choose a clip first.");
  const question = at("question").value.trim();
  if (!question) throw new Error("Write a question first.");
  const maxTokens = Number(at("max-tokens").value);
  if (!Number.isInteger(maxTokens) || maxTokens < 1)
    throw new Error("The number of tokens must be a whole number from 1 on.");
  const answers = {};
  for (const side of SIDES) {
    try {
      answers[side] = newAnswer(pickers[side].value);
    } catch (error) {
      throw new Error(`The ${side} plan cannot be read: ${error.message}`);
    }
  }
  return { clip: clips.clip, question, maxTokens, answers, side: "right" };
}

async function ask() {
  say(at("ask-error"), "");
  let mine;
  try {
    mine = runFromForm();
  } catch (error) {
    say(at("ask-error"), error.message);
    return;
  }
  if (work) work.abort();
  const controller = (work = new AbortController());
  run = mine;
  drawRun();
  setBusy(true);
  await Promise.all(SIDES.map((side) => answer(mine, side, controller.signal)));
  if (work === controller) {
    work = null;
    setBusy(false);
  }
  finish(mine);
}

/** Get one answer, drawing it as it comes. */
async function answer(mine, side, signal) {
  const result = mine.answers[side];
  try {
    result.usage = await api.chat(bodyOf(mine, result.plan), {
      signal,
      onText: (piece) => {
        const first = result.status === "waiting";
        result.text += piece;
        result.status = "streaming";
        if (run !== mine) return;
        if (first) cards[side].draw(result);
        else cards[side].drawText(result);
      },
    });
    result.status = "done";
  } catch (error) {
    result.status = error.name === "AbortError" ? "cancelled" : "error";
    if (result.status === "error") result.error = dealWithKey(error) ? "The server needs a key." : error.message;
  }
  if (run === mine) cards[side].draw(result);
}

/** What follows when both answers are there: comparison, history, drawing. */
function finish(mine) {
  const { left, right } = mine.answers;
  if ([left, right].some((result) => result.status === "done")) {
    runs.unshift(mine);
    drawHistory();
  }
  if (run !== mine) return;
  if (left.error && left.error === right.error) {
    say(at("ask-error"), left.error); // one cause, one place: the question or the clip
    for (const result of [left, right]) [result.error, result.status] = ["", "failed"];
  }
  if (mine.answers[mine.side].status !== "done")
    mine.side = SIDES.find((side) => mine.answers[side].status === "done") || mine.side;
  drawRun();
}

function setBusy(busy) {
  at("ask").disabled = busy;
  at("cancel").hidden = !busy;
  if (!busy && document.activeElement === document.body) at("ask").focus(); // Cancel had the focus, and is gone
}

at("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!at("ask").disabled) ask();
});
at("question").addEventListener("input", drawCode);
at("max-tokens").addEventListener("input", drawCode);
at("cancel").addEventListener("click", () => work && work.abort());

// ------------------------------------------------------------------ drawing a run

function drawRun() {
  const { left, right } = run.answers;
  const longest = Math.max(...[left, right].map((result) => viewer.workSeconds(costsOf(result)) || 0));
  for (const side of SIDES) {
    cards[side].draw(run.answers[side]);
    if (run.answers[side].status === "done") cards[side].drawCosts(run.answers[side], longest);
  }
  const compared = drawComparison(at("badge"), at("gains"), left, right);
  if (compared && !compared.same) for (const side of SIDES) cards[side].drawWords(compared[side]);
  at("report").disabled = !SIDES.some((side) => run.answers[side].status === "done");
  say(at("report-error"), "");
  drawHistory();
  drawKept();
}

/** The viewer of the side that is chosen, with its inspection if that is not here yet. */
async function drawKept() {
  const mine = run,
    result = mine.answers[mine.side];
  say(at("kept-error"), "");
  at("sides").hidden = !SIDES.every((side) => mine.answers[side].status === "done");
  fillSwitch(
    at("sides"),
    "side",
    SIDES.map((side) => [side, planName(mine.answers[side].plan)]),
    mine.side,
    (side) => {
      mine.side = side;
      drawKept();
    },
  );
  if (result.status !== "done") {
    showPlaceholder(
      work ? "The answers come first, then what was kept." : "There is no answer whose tokens could be drawn.",
    );
    return;
  }
  try {
    if (!result.inspection) showPlaceholder(`Looking at what plan ${planName(result.plan)} keeps…`, true);
    const fresh = !result.inspection;
    await inspect(mine, result);
    if (run === mine && result === mine.answers[mine.side]) showViewer(result.inspection, fresh);
  } catch (error) {
    if (run !== mine || dealWithKey(error)) return;
    showPlaceholder("");
    say(at("kept-error"), error.message);
  }
}

async function inspect(mine, result) {
  result.inspecting ||= api.inspect(bodyOf(mine, result.plan)).finally(() => (result.inspecting = null));
  result.inspection ||= await result.inspecting;
}

function clearViewer() {
  if (drawn) drawn.mounted.destroy();
  drawn = null;
}

function showPlaceholder(sentence, loading = false) {
  clearViewer();
  at("viewer").setAttribute("aria-busy", String(loading));
  at("viewer").replaceChildren(
    ...(sentence ? [make("p", { className: `placeholder${loading ? " loading" : ""}` }, sentence)] : []),
  );
}

/** The layer stays when the other side of the same run is chosen, so that one sees the difference. */
function showViewer(inspection, fresh) {
  if (drawn && drawn.inspection === inspection) return;
  const { layer } = run;
  clearViewer();
  at("viewer").setAttribute("aria-busy", "false");
  const title = `plan ${inspection.plan} · ${inspection.question}`;
  const mounted = viewer.mount(at("viewer"), inspection, { layer, autoplay: fresh && layer === undefined, title });
  drawn = { inspection, mounted, run };
}

at("viewer").addEventListener("fastav:layer", (event) => {
  if (drawn) drawn.run.layer = event.detail.layer;
});

// ------------------------------------------------------------------ history, report, code

function drawHistory() {
  at("history-section").hidden = !runs.length;
  at("history").replaceChildren(
    ...runs.map((past) => {
      const { left, right } = past.answers;
      const plans = `${planName(left.plan)} and ${planName(right.plan)}`;
      const button = make(
        "button",
        { type: "button" },
        make("b", {}, past.question),
        make("span", {}, `${past.clip.name} · ${plans}`),
      );
      if (left.status === "done" && right.status === "done") {
        const { same } = viewer.compareTexts(left.text, right.text);
        button.append(make("i", { className: `badge ${same ? "same" : "differs"}` }, same ? "same answer" : "differs"));
      }
      if (past === run) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => restore(past));
      return make("li", {}, button);
    }),
  );
}

function restore(past) {
  if (work) work.abort();
  run = past;
  clips.show(past.clip);
  at("question").value = past.question;
  at("max-tokens").value = past.maxTokens;
  for (const side of SIDES) pickers[side].value = past.answers[side].plan;
  say(at("ask-error"), "");
  drawRun();
  drawCode();
  at("answers-title").scrollIntoView({ block: "start", behavior: "auto" });
}

/** A run as the report's data, of the answers that are complete. */
async function reportData(mine) {
  const complete = SIDES.map((side) => mine.answers[side]).filter((result) => result.status === "done");
  for (const result of complete) await inspect(mine, result);
  const entries = complete.map((result) => ({
    plan: planName(result.plan),
    text: result.text,
    usage: costsOf(result),
    inspection: result.inspection,
  }));
  return {
    schema: 1,
    model: model.id,
    question: mine.question,
    created: new Date().toISOString(),
    version: model.fastav.version,
    runs: entries,
  };
}

at("report").addEventListener("click", async () => {
  const button = at("report");
  button.disabled = true;
  button.textContent = "Preparing…";
  say(at("report-error"), "");
  try {
    const [template, data] = await Promise.all([api.reportTemplate(), reportData(run)]);
    const json = JSON.stringify(data).replaceAll("<", "\\u003c"); // no "</script>" inside the data
    download(
      `fastav-${model.id.replace(/[^\w.-]+/g, "-")}.html`,
      "text/html",
      template.replace("{{data}}", () => json),
    );
  } catch (error) {
    if (!dealWithKey(error)) say(at("report-error"), error.message);
  } finally {
    button.disabled = false;
    button.textContent = "Download report";
  }
});

function drawCode() {
  let plan = "fastav";
  try {
    plan = pickers.right.value || plan;
  } catch {
    // a custom plan that is being written
  }
  const write = language === "python" ? pythonCode : curlCode;
  at("code").textContent = write({
    origin: location.origin,
    model: model ? model.id : "MODEL",
    clip: clips ? clips.clip : null,
    plan,
    hasKey,
    question: at("question").value.trim() || "What happens in the clip?",
    maxTokens: Number(at("max-tokens").value) || 64,
  });
  at("copied").textContent = "";
}

at("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(at("code").textContent);
    at("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(at("code")); // pages without https have no clipboard
    at("copied").textContent = "Selected: copy it with your keyboard.";
  }
});

fillSwitch(
  at("languages"),
  "language",
  [
    ["python", "Python"],
    ["curl", "curl"],
  ],
  language,
  (chosen) => {
    language = chosen;
    drawCode();
  },
);

/** The history is beside the answers where there is room, else below them, in the order of reading too. */
function placeHistory() {
  if (wide.matches) at("aside").append(at("history-section"));
  else at("content").insertBefore(at("history-section"), at("code-section"));
}

const wide = matchMedia("(min-width: 960px)"); // as in app.css
wide.addEventListener("change", placeHistory);
placeHistory();
startTheme(at("theme"));
drawCode();
start();
