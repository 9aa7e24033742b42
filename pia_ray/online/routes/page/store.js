// What this browser keeps: the ids of open jobs in localStorage, pictures and videos in IndexedDB.

const OPEN = "pia-ray-open-jobs";

/** The ids of the jobs that had not ended when the page was last open, the newest first. */
export function openIds() {
  try {
    const found = JSON.parse(localStorage.getItem(OPEN) ?? "[]");
    return Array.isArray(found) ? found.filter((id) => /^video_[0-9a-f]+$/.test(id)) : [];
  } catch {
    return []; // switched off, or not ours
  }
}

export const rememberId = (id) => write([id, ...openIds().filter((each) => each !== id)].slice(0, 100));
export const forgetId = (id) => write(openIds().filter((each) => each !== id));

function write(ids) {
  try {
    if (ids.length) localStorage.setItem(OPEN, JSON.stringify(ids));
    else localStorage.removeItem(OPEN);
  } catch {
    // the open page knows them still
  }
}

/** Works on the store; gives the result of the request that `work` returns. `without`: for a browser without one. */
export function change(work, without) {
  return new Promise((resolve) => {
    const fail = () => {
      without();
      resolve(null);
    };
    let opening;
    try {
      opening = indexedDB.open("pia-ray", 1);
    } catch {
      fail();
      return;
    }
    opening.onupgradeneeded = () => opening.result.createObjectStore("animations", { keyPath: "id" });
    opening.onerror = fail;
    opening.onsuccess = () => {
      const transaction = opening.result.transaction("animations", "readwrite");
      const request = work(transaction.objectStore("animations"));
      transaction.oncomplete = () => {
        opening.result.close();
        resolve(request?.result ?? null);
      };
      transaction.onabort = () => {
        opening.result.close();
        fail(); // no room, as a rule
      };
    };
  });
}
