// A client in another language, made from proto/ alone: it takes a job through its whole life and prints what it saw.
// node client.mjs PROTO_DIR ADDRESS AUTHORITY TOKEN ARCHIVE MODULE FUNCTION
import { readFileSync } from "node:fs";
import { createHash } from "node:crypto";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [protos, address, authority, token, archive, module, fn] = process.argv.slice(2);
const definition = loader.loadSync("steepest/v1/training_jobs.proto", { includeDirs: [protos], keepCase: true, longs: Number, enums: String, oneofs: true });
const { TrainingJobService } = grpc.loadPackageDefinition(definition).steepest.v1;
const bearer = grpc.credentials.createFromMetadataGenerator((_, done) => {
  const metadata = new grpc.Metadata();
  metadata.set("authorization", `Bearer ${token}`);
  done(null, metadata);
});
const secure = grpc.credentials.createSsl(readFileSync(authority));
const client = new TrainingJobService(address, grpc.credentials.combineChannelCredentials(secure, bearer));
const call = (method, request) => new Promise((resolve, reject) => client[method](request, (error, answer) => (error ? reject(error) : resolve(answer))));

const saw = {};
saw.refused = await new Promise((resolve) => {
  new TrainingJobService(address, secure).GetServerInfo({}, (error) => resolve(error && error.code));
});
saw.role = (await call("GetServerInfo", {})).role;
saw.invalid = await call("CreateTrainingJob", { spec: { task: { module, function: fn }, steps: -1 } }).catch((error) => [error.code, error.details]);

const bundle = await new Promise((resolve, reject) => {
  const stream = client.UploadCode((error, answer) => (error ? reject(error) : resolve(answer)));
  const data = readFileSync(archive);
  for (let start = 0; start < data.length; start += 1000) stream.write({ data: data.subarray(start, start + 1000) });
  stream.end();
});
const spec = {
  task: { module, function: fn, code_bundle: bundle.name, arguments: { delay: "0.005" } }, steps: 120, labels: { from: "node" }, optimizer: { name: "adamw", lr: 0.01 },
};
const request = { spec, request_id: "outside-1" };
const [created, again] = await Promise.all([call("CreateTrainingJob", request), call("CreateTrainingJob", request)]);
const name = created.name;
saw.once = created.name === again.name;
saw.listed = (await call("ListTrainingJobs", { filter: "labels.from = node" })).training_jobs.map((job) => job.name === name);

const states = [], sequences = [], asked = new Set();
let ended = null;
for await (const update of client.WatchTrainingJob({ name })) {
  if (update.update === "event") {
    sequences.push(update.event.sequence);
    const state = update.event.state.replace("TRAINING_JOB_STATE_", "");
    if (states.at(-1) !== state) states.push(state);
    if (state === "PAUSED" && !asked.has("resume")) {
      asked.add("resume");
      await call("ResumeTrainingJob", { name });
    }
  } else if (update.update === "progress" && update.progress.step >= 5 && !asked.has("scale")) {
    asked.add("scale");
    saw.workers = (await call("ScaleTrainingJob", { name, workers: 2 })).spec.placement.workers;
    await call("PauseTrainingJob", { name });
  } else if (update.update === "ended") ended = update.ended;
}
saw.states = states;
saw.in_order = sequences.every((sequence, index) => sequence === index + 1);
saw.loss = ended.status.loss;
saw.step = ended.status.step;

const files = {};
for await (const piece of client.DownloadCheckpoint({ name })) {
  files[piece.file] ??= createHash("sha256");
  files[piece.file].update(piece.data);
}
saw.files = Object.fromEntries(Object.entries(files).map(([file, hash]) => [file, hash.digest("hex")]));
saw.records = (await call("QueryHistory", { name })).records.length;
await call("DeleteTrainingJob", { name });
saw.deleted = await call("GetTrainingJob", { name }).catch((error) => error.code);
console.log(JSON.stringify(saw));
process.exit(0);
