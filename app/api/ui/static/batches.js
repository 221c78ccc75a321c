// A new batch: the file is uploaded, and then the batch begins.
import { token, call, Refused } from "./dashboard_calls.js";
import { complain } from "./api_forms.js";

const form = document.getElementById("new-batch");
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const data = new FormData();
    data.append("purpose", "batch");
    data.append("file", form.elements.file.files[0]);
    const answer = await fetch("/v1/files", { method: "POST", headers: { "X-Arriero-Dashboard": token() }, body: data });
    if (!answer.ok) throw new Refused(answer.status, await answer.json().catch(() => null));
    const body = {
      input_file_id: (await answer.json()).id,
      endpoint: form.elements.endpoint.value,
      completion_window: form.elements.completion_window.value,
    };
    const made = await call("POST", "/v1/batches", body);
    location.assign(`/ui/batches/${made.id}`);
  } catch (error) {
    complain(form, error);
    button.disabled = false;
  }
});
