// Pictures: from files, the clipboard, a drop or the camera, to data URIs that the server takes.

const TAKEN = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"];
const MOST_BYTES = 4_000_000, SIDE = 2048; // larger ones are made smaller; the model sees a few hundred pixels

const asUrl = (blob) => new Promise((good, bad) => {
  const reader = new FileReader();
  reader.onload = () => good(reader.result);
  reader.onerror = () => bad(new Error("the file cannot be read"));
  reader.readAsDataURL(blob);
});

// Draws what can be drawn, as a JPEG: other formats, and what is larger than need be.
async function redrawn(source, width, height) {
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.95);
}

// {url, name} of a file. Throws an Error with words for the user.
export async function picture(file) {
  const name = file.name || "picture";
  if (TAKEN.includes(file.type) && file.size <= MOST_BYTES) return { url: await asUrl(file), name };
  try {
    const bitmap = await createImageBitmap(file);
    return { url: await redrawn(bitmap, bitmap.width, bitmap.height), name };
  } catch {
    throw new Error(`${name} is not a picture that this browser can read.`);
  }
}

// The image files among what was pasted or dropped.
export const filesOf = (transfer) => [...(transfer?.files ?? [])].filter((f) => f.type.startsWith("image/"));

// Shows the camera in a dialog; gives {url, name}, or null where it was left.
export async function shoot(dialog, video, problem) {
  let stream = null;
  problem.textContent = "";
  dialog.returnValue = "";
  dialog.showModal();
  const closed = new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  const opened = (async () => {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      video.srcObject = stream;
      await video.play();
    } catch {
      problem.textContent = "There is no camera here, or this page may not use it.";
    }
  })();
  await closed;
  const taken = dialog.returnValue === "shoot" && video.videoWidth > 0
    ? { url: await redrawn(video, video.videoWidth, video.videoHeight), name: "camera" } : null;
  opened.then(() => { stream?.getTracks().forEach((track) => track.stop()); video.srcObject = null; });
  return taken;
}
