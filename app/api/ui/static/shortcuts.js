// Keys of the dashboard: `?` shows them, `/` goes to the search, `g` and a letter to a page. None is taken while the reader
// writes, or together with Ctrl, Alt or Meta.
const dialog = document.getElementById("shortcuts");
let leads = 0;

function show() {
  if (!dialog.open) dialog.showModal();
}

document.addEventListener("click", (event) => {
  if (event.target.closest("[data-shortcuts]")) show();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented) return;
  const field = event.target.closest("input, textarea, select, [contenteditable]");
  if (field) {
    if (event.key === "Escape" && !event.target.matches("textarea")) field.blur();
    return;
  }
  if (dialog.open) return;
  if (Date.now() < leads) {
    leads = 0;
    const page = [...document.querySelectorAll("[data-key]")].find((one) => one.dataset.key === event.key);
    if (page) location.assign(page.href);
    return;
  }
  if (event.key === "g") leads = Date.now() + 1500;
  else if (event.key === "?") show();
  else if (event.key === "/") {
    const search = document.querySelector("input[type=search]");
    if (search) {
      event.preventDefault();
      search.focus();
    }
  }
});
