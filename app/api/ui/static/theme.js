// Light or dark: as the system is, or as the reader has chosen. It runs before the page is drawn.
{
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => localStorage.getItem("arriero-theme");
  const apply = () => {
    const dark = chosen() ? chosen() === "dark" : system.matches;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    for (const one of document.querySelectorAll("[data-theme-switch]")) {
      one.hidden = false;
      one.textContent = dark ? "Light" : "Dark";
    }
  };
  apply();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", apply);
  document.addEventListener("click", (event) => {
    if (!event.target.closest("[data-theme-switch]")) return;
    localStorage.setItem("arriero-theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply();
  });
}
