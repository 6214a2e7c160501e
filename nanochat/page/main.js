// The page starts here. Each module draws its part and hears of changes by events (state.js).

import { setUpAnswers } from "./answers.js";
import { setUpComposer } from "./composer.js";
import { setUpFollowing } from "./follow.js";
import { setUpKeys } from "./keys.js";
import { redrawAll, setUpMessages } from "./messages.js";
import { setUpModels } from "./models.js";
import { setUpSettings } from "./settings.js";
import { setUpSidebar } from "./sidebar.js";
import { emit, load } from "./state.js";
import { setUpAlternatives } from "./sureness.js";

await load();
await setUpAnswers();
setUpSettings();
setUpFollowing();
setUpMessages();
setUpSidebar();
setUpComposer();
setUpAlternatives();
setUpKeys();
emit("list");
redrawAll();
await setUpModels();
document.documentElement.dataset.ready = "true";
