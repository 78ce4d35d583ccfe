/** Server-sent events out of text in pieces of any size. */
export class SseParser {
  #rest = "";
  #data = [];

  /** The data of every event that this piece completes. Comments and other fields are dropped. */
  push(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/); // a last \r may be half of \r\n: it waits
    this.#rest = lines.pop();
    const complete = [];
    for (const line of lines) {
      if (line === "" && this.#data.length) {
        complete.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return complete;
  }
}
