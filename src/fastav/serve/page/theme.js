// Light or dark: the system's theme, until the reader chooses one.

const STORED = "fastav-theme";

function stored() {
  try {
    return localStorage.getItem(STORED);
  } catch {
    return null; // storage is switched off
  }
}

function store(theme) {
  try {
    localStorage.setItem(STORED, theme);
  } catch {
    // the choice then lasts as long as the page
  }
}

export function startTheme(button) {
  const root = document.documentElement,
    system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => (button.textContent = isDark() ? "Light" : "Dark");
  const chosen = stored();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    store(root.dataset.theme);
    name();
  });
  system.addEventListener("change", name);
  name();
}
