// Reads expressions line by line and prints what they are. An unfinished one goes on in the next line.
import * as std from "std";
import * as os from "os";

const show = (value, depth = 0, seen = new Set()) => {
  switch (typeof value) {
    case "string": return depth ? JSON.stringify(value) : value;
    case "bigint": return `${value}n`;
    case "function": return `[Function ${value.name || "(anonymous)"}]`;
    case "object": break;
    default: return String(value);
  }
  if (value === null) return "null";
  if (value instanceof Error) return `${value}\n${value.stack ?? ""}`.trimEnd();
  if (seen.has(value)) return "[Circular]";
  if (depth > 3) return Array.isArray(value) ? "[…]" : "{…}";
  seen = new Set(seen).add(value);
  const next = (inner) => show(inner, depth + 1, seen);
  if (Array.isArray(value) || ArrayBuffer.isView(value)) {
    const some = Array.from(value.length === undefined ? [] : Array.prototype.slice.call(value, 0, 100), next);
    if (value.length > 100) some.push(`… ${value.length - 100} more`);
    return `[ ${some.join(", ")} ]`;
  }
  if (value instanceof Map) return `Map { ${[...value].map(([k, v]) => `${next(k)} => ${next(v)}`).join(", ")} }`;
  if (value instanceof Set) return `Set { ${[...value].map(next).join(", ")} }`;
  if (value instanceof Date || value instanceof RegExp) return String(value);
  const name = value.constructor?.name;
  const inside = Object.keys(value).map((key) => `${key}: ${next(value[key])}`).join(", ");
  return `${name && name !== "Object" ? `${name} ` : ""}{ ${inside} }`;
};

// An error at the very end of the text means that more is to come.
const unfinished = (error, text) =>
  error instanceof SyntaxError && /unexpected token in expression: ''|expecting '[)\]}]'|unexpected end|template/.test(error.message)
  && !text.endsWith("\n\n");

const ask = (prompt) => {
  std.out.puts(prompt);
  std.out.flush();
  return std.in.getline();
};

std.out.puts("JavaScript (QuickJS); std and os are there; ctrl-D ends\n");
let text = "";
for (;;) {
  const line = ask(text ? "… " : "> ");
  if (line === null) break;
  text += text ? `\n${line}` : line;
  if (!text.trim()) {
    text = "";
    continue;
  }
  try {
    let value = std.evalScript(text, { backtrace_barrier: true });
    if (value instanceof Promise) value = await value;
    globalThis._ = value;
    if (value !== undefined) std.out.puts(`${show(value, 1)}\n`);
  } catch (error) {
    if (unfinished(error, `${text}\n`)) continue;
    std.out.puts(`${error instanceof Error ? show(error) : show(error, 1)}\n`);
  }
  text = "";
}
std.out.puts("\n");
