// Starts `surgery lsp` for .surg files.
const { workspace } = require("vscode");
const { LanguageClient } = require("vscode-languageclient/node");

let client;

exports.activate = () => {
  const settings = workspace.getConfiguration("surgery");
  const server = { command: settings.get("command"), args: ["lsp"] };
  client = new LanguageClient("surgery", "Surgery", server, {
    documentSelector: [{ language: "surg" }],
    initializationOptions: { model: settings.get("model") },
  });
  return client.start();
};

exports.deactivate = () => client?.stop();
