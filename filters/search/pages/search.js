"use strict";
const drop = document.getElementById("drop"), said = document.getElementById("said");

async function ask(file) {
  said.textContent = "looking …";
  const only = document.querySelector("select[name=only]").value;
  try {
    const answer = await fetch("/ask", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
    const told = await answer.json();
    if (answer.ok) location.assign("/?only=" + encodeURIComponent(only) + "&image=" + encodeURIComponent(told.image));
    else said.textContent = told.error;
  } catch (error) {
    said.textContent = "The server does not answer.";
  }
}

document.getElementById("file").addEventListener("change", (event) => event.target.files[0] && ask(event.target.files[0]));
for (const name of ["dragenter", "dragover"]) document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) ask(file); else said.textContent = "Drop an image file.";
});
