// The column of one plan: its choice, its answer, what that cost.

import { make, say } from "./dom.js";
import { planName } from "./plans.js";

const viewer = globalThis.FastavViewer;

/** What became of a question with one plan; part of a run, and drawn by an AnswerCard. */
export function newAnswer(plan) {
  return { plan, text: "", status: "waiting", usage: null, error: "", inspection: null };
}

/** `usage.fastav` of a finished answer, or null. */
export const costsOf = (answer) => (answer.usage && answer.usage.fastav) || null;

const STATUS = {
  waiting: "waiting for the server…",
  streaming: "answering…",
  done: "",
  cancelled: "cancelled",
  error: "",
};

export class AnswerCard {
  constructor(element, picker) {
    this.element = element;
    this.picker = picker;
    this.note = make("p", { className: "note soft" });
    this.text = make("p", { className: "text", "aria-live": "polite" });
    this.error = make("p", { className: "error", role: "alert", hidden: true });
    this.costs = make("div", { className: "costs" });
    element.append(picker.element, this.text, this.note, this.error, this.costs);
    this.draw(null);
  }

  draw(answer) {
    const status = answer ? answer.status : "empty";
    this.element.dataset.status = status;
    this.text.setAttribute("aria-busy", String(status === "waiting" || status === "streaming")); // read aloud when complete
    this.drawText(answer);
    this.note.textContent = answer ? STATUS[status] : "";
    this.note.hidden = !this.note.textContent;
    say(this.error, answer && answer.error);
    this.costs.replaceChildren();
    this.drawPlan(answer);
  }

  drawText(answer) {
    this.text.textContent = answer ? answer.text : "The answer appears here as it is generated.";
    this.text.classList.toggle("placeholder", !answer);
    if (answer && answer.status === "done" && !answer.text.trim()) this.text.textContent = "(an empty answer)";
    this.text.hidden = Boolean(answer) && !this.text.textContent;
  }

  /** Tell which plan answered where another one is chosen by now. */
  drawPlan(answer) {
    let chosen = null;
    try {
      chosen = this.picker.value;
    } catch {
      // a custom plan that is being written
    }
    const stale = answer && answer.status === "done" && JSON.stringify(chosen) !== JSON.stringify(answer.plan);
    if (answer && answer.status === "done") {
      this.note.textContent = stale ? `answered with plan ${planName(answer.plan)}` : "";
      this.note.hidden = !stale;
    }
  }

  drawCosts(answer, longest) {
    const usage = costsOf(answer);
    this.costs.replaceChildren(
      ...(usage ? [viewer.costs(usage, { longest, generated: answer.usage.completion_tokens })] : []),
      ...((usage && usage.warnings) || []).map((text) => make("p", { className: "error" }, text)),
    );
  }

  drawWords(words) {
    viewer.writeWords(this.text, words);
  }
}

/** Agreement of two answers and what the right one saved, above them. */
export function drawComparison(badge, gains, left, right) {
  const finished = left.status === "done" && right.status === "done";
  badge.hidden = gains.hidden = true;
  if (!finished) return null;
  const compared = viewer.compareTexts(left.text, right.text);
  badge.hidden = false;
  badge.className = `badge ${compared.same ? "same" : "differs"}`;
  badge.textContent = compared.same ? "same answer" : "answers differ";
  drawGains(gains, left, right);
  return compared;
}

function drawGains(gains, left, right) {
  const [from, to] = [costsOf(left), costsOf(right)];
  if (!from || !to) return;
  const tiles = [];
  const tile = (name, before, after, show) => {
    if (!before) return;
    const value = `${(after / before).toFixed(2)}×`;
    tiles.push(
      make(
        "div",
        {},
        make("dt", {}, name),
        make("dd", {}, make("b", {}, value), make("span", {}, `${show(after)} against ${show(before)}`)),
      ),
    );
  };
  const { format } = viewer;
  if (from.flops && to.flops) tile("prefill FLOPs", from.flops.pruned, to.flops.pruned, format.flops);
  if (from.kv_bytes && to.kv_bytes) tile("KV cache", from.kv_bytes.pruned, to.kv_bytes.pruned, format.bytes);
  tile("time without queue", viewer.workSeconds(from), viewer.workSeconds(to), format.seconds);
  gains.replaceChildren(...tiles);
  gains.hidden = !tiles.length;
}
