const picture = element("picture"), drop = element("drop"), waiting = "the prediction appears here";
element("title").textContent = `Classify a picture: one of ${classes.length} classes`;

// --- from the picture to an image like the training set's: the steps of mnist_dist.predict ---

const triangle = x => Math.max(0, 1 - Math.abs(x));

/** Returns the part of a picture that is used and the part of the image that it fills, each [top, left, height, width]. */
function boxes(height, width) {
  const centred = (inner, outer) => [...outer.map((length, axis) => Math.floor((length - inner[axis]) / 2)), ...inner];
  if ((geometry.resize ?? "crop") === "crop") {
    const scale = Math.max(HEIGHT / height, WIDTH / width);
    const used = [[height, HEIGHT], [width, WIDTH]].map(([from, to]) => Math.max(1, Math.min(from, round(to / scale))));
    return [centred(used, [height, width]), [0, 0, HEIGHT, WIDTH]];
  }
  if (geometry.resize === "pad") {
    const scale = Math.min(1, HEIGHT / height, WIDTH / width);
    const filled = [height, width].map(length => Math.max(1, round(length * scale)));
    return [[0, 0, height, width], centred(filled, [HEIGHT, WIDTH])];
  }
  return [[0, 0, height, width], [0, 0, HEIGHT, WIDTH]];
}

/** Resizes a plane of levels, first along x, then along y. */
function resize(plane, width, height, newWidth, newHeight) {
  const pass = (levels, lines, length, size, along, across, newAlong, newAcross) => {
    if (length === size) return levels;
    const made = new Uint8ClampedArray(lines * size);
    weightsOf(length, size, triangle, 1).forEach(({first, weights}, index) => {
      for (let line = 0; line < lines; line++) {
        let sum = 0;
        for (let step = 0; step < weights.length; step++) sum += weights[step] * levels[line * across + (first + step) * along];
        made[line * newAcross + index * newAlong] = sum;
      }
    });
    return made;
  };
  const narrow = pass(plane, height, width, newWidth, 1, width, 1, newWidth);
  return pass(narrow, newWidth, height, newHeight, newWidth, 1, newWidth, 1);
}

let bitmap = null;  // the picture, upright

/** Returns the picture as the levels of the network's input, channel after channel; null without a picture. */
function prepare() {
  if (!bitmap) return null;
  const [[top, left, height, width], [y, x, newHeight, newWidth]] = boxes(bitmap.height, bitmap.width);
  const canvas = new OffscreenCanvas(width, height), sheet = canvas.getContext("2d", {willReadFrequently: true});
  sheet.fillRect(0, 0, width, height);  // transparent parts become black
  sheet.drawImage(bitmap, -left, -top);
  const pixels = sheet.getImageData(0, 0, width, height).data;
  const image = new Uint8Array(CHANNELS * HEIGHT * WIDTH);
  for (let channel = 0; channel < CHANNELS; channel++) {
    const plane = new Uint8ClampedArray(width * height);
    for (let index = 0; index < plane.length; index++) {
      const at = 4 * index;
      plane[index] = CHANNELS === 3 ? pixels[at + channel]
        : (19595 * pixels[at] + 38470 * pixels[at + 1] + 7471 * pixels[at + 2] + 0x8000) >> 16;  // ITU-R BT.601
    }
    const small = resize(plane, width, height, newWidth, newHeight);
    for (let line = 0; line < newHeight; line++) {
      const start = (channel * HEIGHT + y + line) * WIDTH + x;
      image.set(small.subarray(line * newWidth, (line + 1) * newWidth), start);
    }
  }
  return image;
}

// --- where pictures come from ---

const unfinished = () => false;
const MOST_PIXELS = 1e8;  // a larger picture would fill the memory

async function read(file) {
  element("trouble").textContent = "";
  try {
    if (!file) throw new Error("there is no file");
    // No conversion of colours: mnist_dist ignores the colour profiles of files.
    const found = await createImageBitmap(file, {imageOrientation: "from-image", colorSpaceConversion: "none"});
    if (found.width * found.height > MOST_PIXELS) throw new Error("too many pixels");
    show(found, file.name);
  } catch (error) {
    show(null, "");
    element("trouble").textContent =
      `This browser cannot read ${file?.name || "it"}: ${error.message ?? error} Save the picture as PNG or JPEG.`;
  }
}

function show(found, name) {
  bitmap?.close();
  bitmap = found;
  const scale = found ? Math.min(1, 800 / Math.max(found.width, found.height)) : 0;
  picture.width = Math.max(1, Math.round(scale * (found?.width ?? 1)));
  picture.height = Math.max(1, Math.round(scale * (found?.height ?? 1)));
  if (found) picture.getContext("2d").drawImage(found, 0, 0, picture.width, picture.height);
  picture.setAttribute("aria-label", found ? `Picture ${name}` : "No picture");
  element("hint").style.display = found ? "none" : "";
  update();
}

for (const input of document.querySelectorAll("input[type=file]"))
  input.addEventListener("change", () => {
    read(input.files[0]);
    input.value = "";  // the same file may be chosen again
  });
document.addEventListener("dragover", event => { event.preventDefault(); drop.classList.add("over"); });
document.addEventListener("dragleave", event => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", event => {
  event.preventDefault();  // the browser would open the file instead of the page
  drop.classList.remove("over");
  read(event.dataTransfer.files[0]);
});
document.addEventListener("paste", event => { if (event.clipboardData.files.length) read(event.clipboardData.files[0]); });
element("clear").addEventListener("click", () => show(null, ""));
