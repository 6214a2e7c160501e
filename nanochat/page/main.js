// The page starts here. Each module draws its part and hears of changes by events (state.js).

import { setUpComposer } from "./composer.js";
import { $ } from "./dom.js";
import { setUpFollowing } from "./follow.js";
import { setUpKeys } from "./keys.js";
import { redrawAll, setUpMessages } from "./messages.js";
import { setUpModels } from "./models.js";
import { setUpSettings } from "./settings.js";
import { setUpSidebar, toggleMenu } from "./sidebar.js";
import { emit, load } from "./state.js";
import { setUpAlternatives } from "./sureness.js";

await load();
setUpSettings();
setUpFollowing();
setUpMessages();
setUpSidebar();
setUpComposer();
setUpAlternatives();
setUpKeys();
$("menu").addEventListener("click", toggleMenu);
emit("list");
redrawAll();
await setUpModels();
document.documentElement.dataset.ready = "true";
