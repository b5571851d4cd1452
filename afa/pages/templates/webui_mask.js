// The canvas of afa ui's regions: paint with a finger, a pen or a mouse; the mask is read as run lengths, column by column.
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d", {willReadFrequently: true});
const brush = element.querySelector("input[type=range]"), under = element.querySelector("img");
const side = canvas.width;
let last = null;

const at = (event) => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * side, (event.clientY - box.top) / box.height * side];
};
const stroke = (event) => {
  const now = at(event);
  pen.lineWidth = Number(brush.value); pen.lineCap = "round"; pen.strokeStyle = "#2563eb";
  pen.globalCompositeOperation = element.querySelector("input[type=checkbox]").checked ? "destination-out" : "source-over";
  pen.beginPath(); pen.moveTo(...(last || now)); pen.lineTo(now[0] + 0.01, now[1]); pen.stroke();
  last = now;
};
canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); last = null; stroke(event); event.preventDefault(); });
canvas.addEventListener("pointermove", (event) => { if (event.buttons) { stroke(event); } });

const fill = {
  left: [0, 0, side / 2, side], right: [side / 2, 0, side / 2, side], top: [0, 0, side, side / 2], bottom: [0, side / 2, side, side / 2],
};
window.afaPaint = (what) => {
  if (what === "clear") { pen.clearRect(0, 0, side, side); return; }
  pen.fillStyle = "#2563eb";
  pen.globalCompositeOperation = what === "invert" ? "xor" : "source-over";
  pen.fillRect(...(fill[what] || [0, 0, side, side]));
};
for (const button of element.querySelectorAll("button")) { button.addEventListener("click", () => window.afaPaint(button.dataset.paint)); }

window.afaMask = () => {
  const pixels = pen.getImageData(0, 0, side, side).data, counts = [];
  let inside = false, run = 0, some = false;
  for (let column = 0; column < side; column++) {
    for (let row = 0; row < side; row++) {
      const now = pixels[4 * (row * side + column) + 3] > 127;
      if (now !== inside) { counts.push(run); run = 0; inside = now; }
      run += 1; some = some || now;
    }
  }
  counts.push(run);
  return some ? JSON.stringify({size: [side, side], counts}) : "";
};

// Under the mask lies the first of the latest pictures.
const results = document.querySelector("#afa-results");
const follow = () => {
  const picture = results && results.querySelector("a img");
  if (picture && under.getAttribute("src") !== picture.getAttribute("src")) { under.src = picture.getAttribute("src"); under.hidden = false; }
};
under.addEventListener("load", () => { element.querySelector(".afa-canvas").style.aspectRatio = `${under.naturalWidth} / ${under.naturalHeight}`; });
if (results) { new MutationObserver(follow).observe(results, {childList: true, subtree: true}); follow(); }
