/** Bad input or a file that cannot be used; the message says what was found, what is expected, and what to do. */
export class CascadeError extends Error {
  override name = "CascadeError";
}
