import { make } from "./dom.js";

const PLAIN_BYTES = 1 << 20;
const MAX_SIDE = 2048;
const KEPT = ["image/png", "image/jpeg", "image/webp", "image/gif"];

/** A message's content: files come before the text that is about them. */
export function contentOf(ask, shown = []) {
  if (!shown.length) return ask;
  const parts = shown.map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } }));
  return [...parts, { type: "text", text: ask }];
}

/** Small pictures of files; `remove`, if given, is called with the one to take away. */
export function thumbnails(shown, remove) {
  return shown.map((file) => {
    const { kind, url, name } = file;
    const picture = kind === "image" ? make("img", { src: url, alt: name }) : make("span", {}, `▶ ${name}`);
    if (!remove) return make("span", { className: "file" }, picture);
    const button = make("button", { type: "button", className: "quiet", ariaLabel: `Remove ${name}` }, "×");
    button.onclick = () => remove(file);
    return make("span", { className: "file" }, picture, button);
  });
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** A file of the user's as { kind, url, name }. Large photos are made smaller: the model sees less of them anyway. */
async function read(file) {
  const kind = file.type.split("/")[0];
  if (kind === "video") return { kind, url: await dataUrl(file), name: file.name };
  if (KEPT.includes(file.type) && file.size <= PLAIN_BYTES) return { kind, url: await dataUrl(file), name: file.name };
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.ceil(bitmap.width * scale), Math.ceil(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // as transparency is laid on white elsewhere
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return { kind, url: await dataUrl(await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 })), name: file.name };
}

/** The files that go with the next message: chosen, dropped on the page or pasted. */
export class Attachments {
  /** allowed: whether the model takes any; told: what a person is told of a file that cannot be taken. */
  constructor(list, allowed, told) {
    this.list = list;
    this.allowed = allowed;
    this.told = told;
    this.shown = [];
    document.addEventListener("dragover", (event) => {
      if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
      if (!event.dataTransfer?.files.length) return;
      event.preventDefault();
      this.add(event.dataTransfer.files);
    });
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length) return;
      event.preventDefault();
      this.add(files);
    });
  }

  async add(files) {
    this.told(); // what was said of earlier files
    for (const file of files) {
      if (!/^(image|video)\//.test(file.type)) this.told(`${file.name} is neither an image nor a video.`);
      else if (!this.allowed()) this.told("This model takes no images.");
      else {
        try {
          this.set([...this.shown, await read(file)]);
        } catch {
          this.told(`${file.name} cannot be read.`);
        }
      }
    }
  }

  set(shown) {
    this.shown = shown;
    this.list.replaceChildren(...thumbnails(shown, (file) => this.set(this.shown.filter((other) => other !== file))));
    this.list.hidden = !shown.length;
  }

  take() {
    const shown = this.shown;
    this.set([]);
    return shown;
  }
}
