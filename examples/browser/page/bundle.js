/** Opens a bundle: a ZIP archive of stored files, and a manifest with the sha256 of each. */

const FORMAT = 2; // of the manifest
const MANIFEST = "manifest.json";
const UNLISTED = [MANIFEST, "signature.json"]; // a manifest does not list these
const END = { signature: 0x06054b50, size: 22 };
const CENTRAL = { signature: 0x02014b50, size: 46 };
const LOCAL = { signature: 0x04034b50, size: 30 };
const STORED = 0;

/** What is wrong with a bundle, as a sentence for the person at the page. */
export class BundleError extends Error {}

/**
 * Return the files of a bundle by name, each as the manifest says. Of a nested bundle, those of its
 * default cell are among them. A signature is not checked.
 * @param {ArrayBuffer} content of the .m2d file
 * @returns {Promise<Map<string, Uint8Array>>}
 * @throws {BundleError} when it is no bundle, or a byte differs
 */
export async function openBundle(content) {
  const files = entriesOf(content);
  if (!files.has(MANIFEST)) throw new BundleError(`This is no bundle: it has no ${MANIFEST}.`);
  const manifest = jsonOf(files, MANIFEST);
  if (manifest.format !== FORMAT) {
    throw new BundleError(`This page reads bundles of format ${FORMAT}, not ${manifest.format}.`);
  }
  const listed = new Map(Object.entries(manifest.files));
  const surplus = [...files.keys()].find((name) => !UNLISTED.includes(name) && !listed.has(name));
  if (surplus) throw new BundleError(`The bundle holds ${surplus}, which its manifest does not list.`);
  for (const [name, { size, sha256 }] of listed) {
    const file = files.get(name);
    if (!file) throw new BundleError(`The bundle lacks ${name}.`);
    if (file.length !== size || (await sha256Of(file)) !== sha256) {
      throw new BundleError(`${name} is not the file that the manifest lists; download the bundle again.`);
    }
  }
  return files;
}

/**
 * Return what a JSON file of a bundle holds.
 * @param {Map<string, Uint8Array>} files
 * @param {string} name
 * @throws {BundleError} when it is missing or no JSON
 */
export function jsonOf(files, name) {
  if (!files.has(name)) throw new BundleError(`The bundle lacks ${name}.`);
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(files.get(name)));
  } catch {
    throw new BundleError(`${name} cannot be read; download the bundle again.`);
  }
}

/** Read the directory at the end. The files follow one another from the first byte to it. */
function entriesOf(content) {
  const view = new DataView(content), files = new Map();
  const damaged = new BundleError("This is no bundle, or it is damaged; download it again.");
  const end = content.byteLength - END.size;
  if (end < 0 || view.getUint32(end, true) !== END.signature) throw damaged;
  const directory = view.getUint32(end + 16, true);
  let position = directory, offset = 0, last = "";
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    if (position + CENTRAL.size > end) throw damaged;
    const size = view.getUint32(position + 24, true), length = view.getUint16(position + 28, true);
    const start = offset + LOCAL.size + length;
    const plain = view.getUint32(position, true) === CENTRAL.signature
      && view.getUint16(position + 10, true) === STORED && view.getUint32(position + 20, true) === size
      && view.getUint32(position + 42, true) === offset && start + size <= directory
      && view.getUint32(offset, true) === LOCAL.signature
      && view.getUint16(offset + 26, true) === length && view.getUint16(offset + 28, true) === 0;
    if (!plain || position + CENTRAL.size + length > end) throw damaged;
    const name = new TextDecoder().decode(new Uint8Array(content, position + CENTRAL.size, length));
    if (name <= last) throw new BundleError(`The bundle holds ${name} twice, or not in its place.`);
    last = name;
    files.set(name, new Uint8Array(content, start, size));
    position += CENTRAL.size + length;
    offset = start + size;
  }
  if (offset !== directory || position !== end) throw damaged;
  return files;
}

async function sha256Of(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new BundleError("Browsers compute sha256 for pages from https or localhost only; open this page from there.");
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
