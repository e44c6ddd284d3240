// Signing in, where the service asks for a token, and who is signed in.
import { h, post } from "./util.js";

// Who asks, or null when a token is needed first.
export async function session() {
  const response = await fetch("/api/session");
  return response.status === 401 ? null : response.json();
}

export function showSignIn(main, done) {
  const token = h("input", { id: "token", type: "password", autocomplete: "current-password", required: true });
  const problem = h("p", { class: "problem", role: "alert" });
  const form = h("form", {
    class: "card sign-in",
    onsubmit: async (event) => {
      event.preventDefault();
      try {
        await post("/api/sign-in", { token: token.value });
        done();
      } catch (error) {
        problem.textContent = error.message;
        token.select();
      }
    },
  },
  h("h1", {}, "Sign in"),
  h("p", {}, "This service needs a token. An administrator makes one with ", h("code", {}, "steepest token create NAME"), "."),
  h("label", { for: "token" }, "Token"), token,
  h("button", { class: "primary", type: "submit" }, "Sign in"), problem);
  main.replaceChildren(form);
  token.focus();
}

// The name and a button in the page's head; nothing where no token is needed.
export function showCaller(place, caller) {
  place.replaceChildren();
  if (!caller.name) return;
  place.append(
    h("span", { title: `role: ${caller.role}` }, caller.name),
    h("button", { class: "quiet", type: "button", onclick: async () => { await post("/api/sign-out"); location.reload(); } }, "Sign out"),
  );
}
