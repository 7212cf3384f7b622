// The choice of a plan at the head of a column.

import { make } from "./dom.js";

const CUSTOM = "custom…";

export class PlanPicker {
  constructor(side, onChange) {
    this.recipes = new Set();
    this.select = make("select", { id: `${side}-plan`, disabled: true });
    this.budget = make("input", {
      id: `${side}-budget`,
      type: "number",
      min: "0.01",
      max: "1",
      step: "0.01",
      placeholder: "default",
      inputMode: "decimal",
    });
    this.custom = make("textarea", {
      id: `${side}-custom`,
      rows: 2,
      spellcheck: false,
      placeholder: 'dart@0.3, or a plan as JSON (fastav plan write)',
    });
    this.budgetLabel = make("label", { className: "inline", hidden: true }, "keep ", this.budget);
    this.customLabel = make(
      "label",
      { className: "custom", hidden: true },
      make("span", { className: "unseen" }, "Custom plan"),
      this.custom,
    );
    this.element = make(
      "div",
      { className: "picker" },
      make("label", { className: "inline" }, make("span", { className: "unseen" }, `${side} `), "Plan ", this.select),
      this.budgetLabel,
      this.customLabel,
    );
    this.element.addEventListener("input", () => {
      this._showFields();
      onChange();
    });
  }

  /** Offer what the model has. */
  offer({ plans, recipes, budgets }, chosen) {
    const options = (names) => names.map((name) => make("option", { value: name }, name));
    const offered = recipes.filter((name) => !plans.includes(name));
    this.recipes = new Set(offered.filter((name) => budgets.includes(name))); // those that take a budget
    this.select.replaceChildren(
      make("optgroup", { label: "Plans of this model" }, ...options(plans)),
      make("optgroup", { label: "Recipes" }, ...options(offered)),
      make("optgroup", { label: "Your own" }, ...options([CUSTOM])),
    );
    this.select.disabled = false;
    this.value = chosen;
  }

  _showFields() {
    this.budgetLabel.hidden = !this.recipes.has(this.select.value);
    this.customLabel.hidden = this.select.value !== CUSTOM;
  }

  /** The plan as a request names it: a name, or an object. Throws SyntaxError if JSON has an error. */
  get value() {
    const name = this.select.value;
    if (name === CUSTOM) {
      const text = this.custom.value.trim();
      if (!text) throw new SyntaxError("Write a plan’s name or JSON.");
      return text.startsWith("{") ? JSON.parse(text) : text;
    }
    return this.recipes.has(name) && this.budget.value ? `${name}@${this.budget.value}` : name;
  }

  set value(plan) {
    const [name, budget] = typeof plan === "string" ? plan.split("@") : [];
    const known = [...this.select.options].some((option) => option.value === name && name !== CUSTOM);
    if (known && (!budget || this.recipes.has(name))) {
      this.select.value = name;
      this.budget.value = budget || "";
    } else {
      this.select.value = CUSTOM;
      this.custom.value = typeof plan === "string" ? plan : JSON.stringify(plan);
    }
    this._showFields();
  }
}

/** A plan in a few words. */
export function planName(plan) {
  return typeof plan === "string" ? plan : plan.name || "custom plan";
}
