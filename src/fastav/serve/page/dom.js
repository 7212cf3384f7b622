// Small helpers for elements.

export const at = (id) => document.getElementById(id);

/** An element with properties and children. Texts stay texts: nothing here parses HTML. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Show a sentence in an element that is hidden without one. */
export function say(element, sentence) {
  element.textContent = sentence || "";
  element.hidden = !sentence;
}

/** Fill a group of radio buttons that look like a switch; arrow keys then work by themselves. */
export function fillSwitch(element, name, choices, chosen, onChange) {
  element.replaceChildren(
    ...choices.map(([value, label]) => {
      const input = make("input", { type: "radio", name, value, checked: value === chosen });
      input.addEventListener("change", () => onChange(value));
      return make("label", {}, input, make("span", {}, label));
    }),
  );
}

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // a browser may start reading it later
}
