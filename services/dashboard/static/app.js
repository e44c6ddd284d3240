import { recall, remember } from "./util.js";
import { showJobs } from "./jobs.js";
import { showJob } from "./job.js";
import { session, showCaller, showSignIn } from "./sign-in.js";

const main = document.getElementById("main");
const crumbs = document.getElementById("crumbs");

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = theme === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", theme === "dark" ? "Use light colors" : "Use dark colors");
  document.dispatchEvent(new Event("theme"));
}

const prefers = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
setTheme(recall("theme", prefers));
document.getElementById("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  remember("theme", theme);
  setTheme(theme);
});

let leave = () => {};

function route() {
  leave();
  const match = location.pathname.match(/^\/jobs\/([^/]+)$/);
  crumbs.textContent = match ? `/ ${decodeURIComponent(match[1])}` : "";
  leave = match ? showJob(main, decodeURIComponent(match[1])) : showJobs(main);
}

// Links between the two pages load nothing anew.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='/']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button || link.target) return;
  if (!/^\/(jobs\/[^/]+)?$/.test(link.pathname)) return;
  event.preventDefault();
  if (link.pathname !== location.pathname) history.pushState(null, "", link.href);
  route();
  window.scrollTo(0, 0);
  main.focus({ preventScroll: true });
});
window.addEventListener("popstate", route);

async function start() {
  const caller = await session();
  if (caller === null) { showSignIn(main, start); return; }
  showCaller(document.getElementById("caller"), caller);
  route();
}
start();
