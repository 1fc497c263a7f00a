//! `/openapi.json` (OpenAPI 3.0.3), made from the table of routes and from sample values of the types.

use serde_json::{Map, Value, json};

use super::{
    error::{Code, ErrorBody},
    routes,
    types::{
        ApView, CopyProgress, Cordon, DiskView, DrainProgress, DrainReport, DrainRequest, DrainedImage,
        FileView, GiveRequest, Given, HostChance, HostView, ImageView, LogView, LoginReply, LoginRequest,
        MigrateRequest, MirrorCheck, MirrorState, MirrorsRequest, MoveOutcome, MovePlan, MoveProgress,
        MoveReport, NextView, Operation, OperationState, OperatorView, PhaseView, Place, PredictionView,
        ProcessView, Pulse, PulseRequest, Ready, Replica, ReplicaHit, ReplicaKind, Resources, RoamAction,
        RoamReply, RoamRequest, ScrubReport, SocketView, State,
    },
};
use crate::events::Event;

/// The description of the API.
pub fn document() -> Value {
    let mut paths = Map::new();
    for route in routes() {
        let mut parameters: Vec<Value> = route
            .path
            .split(['{', '}'])
            .skip(1)
            .step_by(2)
            .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
            .collect();
        for name in route.query {
            parameters.push(
                json!({ "name": name, "in": "query", "required": false, "schema": { "type": "string" } }),
            );
        }
        let mut operation = json!({
            "summary": route.summary,
            "operationId": operation_id(route.method.as_str(), route.path),
            "parameters": parameters,
            "responses": {
                "200": { "description": route.answer, "content": content(route.answer) },
                "default": { "description": "An error.", "content": content("ErrorBody") },
            },
        });
        if let Some(body) = route.body {
            operation["requestBody"] = json!({ "required": false, "content": content(body) });
        }
        let entry = paths.entry(route.path).or_insert_with(|| json!({}));
        entry[route.method.as_str().to_lowercase()] = operation;
    }
    json!({
        "openapi": "3.0.3",
        "info": { "title": "Kage host API", "version": env!("CARGO_PKG_VERSION"), "license": { "name": "Apache-2.0 OR MIT" } },
        "servers": [{ "url": "/", "description": "unix socket of the daemon, or its peer port with mutual TLS" }],
        "paths": paths,
        "components": { "schemas": schemas() },
    })
}

fn operation_id(method: &str, path: &str) -> String {
    let words =
        path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty() && *word != "v1");
    std::iter::once(method.to_lowercase().as_str()).chain(words).collect::<Vec<_>>().join("_")
}

fn content(answer: &str) -> Value {
    let reference = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    match answer {
        "bytes" => {
            json!({ "application/octet-stream": { "schema": { "type": "string", "format": "binary" } } })
        }
        "text" => json!({ "text/plain": { "schema": { "type": "string" } } }),
        "Event" => json!({ "text/event-stream": { "schema": reference("Event") } }),
        "OpenApi" => json!({ "application/json": { "schema": { "type": "object" } } }),
        _ => match answer.strip_suffix("[]") {
            Some(item) => {
                json!({ "application/json": { "schema": { "type": "array", "items": reference(item) } } })
            }
            None => json!({ "application/json": { "schema": reference(answer) } }),
        },
    }
}

/// The schema of what a sample looks like. `null` stands for an optional text.
fn schema_of(sample: &Value) -> Value {
    match sample {
        Value::Null => json!({ "type": "string", "nullable": true }),
        Value::Bool(_) => json!({ "type": "boolean" }),
        Value::Number(number) if number.is_f64() => json!({ "type": "number" }),
        Value::Number(_) => json!({ "type": "integer" }),
        Value::String(_) => json!({ "type": "string" }),
        Value::Array(items) => {
            json!({ "type": "array", "items": items.first().map_or_else(|| json!({}), schema_of) })
        }
        Value::Object(fields) => {
            let properties: Map<_, _> =
                fields.iter().map(|(name, value)| (name.clone(), schema_of(value))).collect();
            let required: Vec<_> =
                fields.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name).collect();
            json!({ "type": "object", "properties": properties, "required": required })
        }
    }
}

fn schemas() -> Value {
    let mut all = Map::new();
    let mut add = |name: &str, sample: Result<Value, serde_json::Error>| {
        let sample = sample.unwrap_or_default();
        let mut schema = schema_of(&sample);
        schema["example"] = sample;
        all.insert(name.to_owned(), schema);
    };
    let samples = Samples::new();
    add("ErrorBody", serde_json::to_value(ErrorBody::new(Code::NotFound, "user bob has no image")));
    add("ImageView", serde_json::to_value(&samples.image));
    add(
        "LoginRequest",
        serde_json::to_value(LoginRequest { at: Some("ap-1".into()), ..LoginRequest::default() }),
    );
    add("LoginReply", serde_json::to_value(&samples.login));
    add("GiveRequest", serde_json::to_value(GiveRequest { to: samples.host.name.clone() }));
    add("Given", serde_json::to_value(Given { term: Some(samples.image.term) }));
    add("ScrubReport", serde_json::to_value(ScrubReport::of(&samples.image.user)));
    add("MigrateRequest", serde_json::to_value(MigrateRequest::default()));
    add(
        "MirrorsRequest",
        serde_json::to_value(MirrorsRequest { hosts: Some(vec![samples.host.name.clone()]) }),
    );
    add("MirrorCheck", serde_json::to_value(&samples.mirror));
    add(
        "MirrorState",
        serde_json::to_value(MirrorState {
            epoch: samples.mirror.epoch,
            digest: samples.mirror.mirror_digest.clone(),
            wrong_pages: 0,
        }),
    );
    add("MovePlan", serde_json::to_value(&samples.plan));
    add("MoveReport", serde_json::to_value(&samples.report));
    add("Operation", serde_json::to_value(&samples.operation));
    add("Resources", serde_json::to_value(&samples.resources));
    add("Place", serde_json::to_value(&samples.place));
    add("PredictionView", serde_json::to_value(&samples.prediction));
    add("LogView", serde_json::to_value(LogView { text: "ready\n".into(), next: 6, truncated: false }));
    add("HostView", serde_json::to_value(&samples.host));
    let copy = CopyProgress { round: 1, dirty_pages: Some(40), eta_ms: Some(240), ..CopyProgress::default() };
    let progress = MoveProgress { phase: "copy".into(), copy: Some(copy) };
    add("MoveProgress", serde_json::to_value(progress));
    let changed = Cordon { host: samples.host.name.clone(), cordoned: true, changed: true };
    add("Cordon", serde_json::to_value(changed));
    add("DrainRequest", serde_json::to_value(DrainRequest { parallel: Some(4), ..DrainRequest::default() }));
    add("DrainReport", serde_json::to_value(&samples.drained));
    let progress = DrainProgress { phase: "drain".into(), eta_ms: Some(4200), ..DrainProgress::default() };
    add("DrainProgress", serde_json::to_value(progress));
    let operator = OperatorView { key_file: Some("/etc/kage/operator.pub".into()) };
    add("OperatorView", serde_json::to_value(operator));
    add("ApView", serde_json::to_value(&samples.ap));
    add("RoamRequest", serde_json::to_value(&samples.roam));
    add("RoamReply", serde_json::to_value(&samples.roamed));
    add("PulseRequest", serde_json::to_value(PulseRequest { on: true }));
    add("Pulse", serde_json::to_value(Pulse { gap_ms: 0.25, stall_ms: 0.5, ..Pulse::default() }));
    add("Ready", serde_json::to_value(&samples.ready));
    add("Event", serde_json::to_value(&samples.event));
    // What a Duration or a rate looks like is text with a unit; the defaults above do not show it.
    for (name, fields) in [
        ("MigrateRequest", ["blackout", "timeout", "bandwidth"]),
        ("DrainRequest", ["blackout", "timeout", "bandwidth"]),
    ] {
        for field in fields {
            all[name]["properties"][field]["description"] = json!("with a unit: 10ms, 30s, 50mbit");
        }
    }
    Value::Object(all)
}

struct Samples {
    image: ImageView,
    login: LoginReply,
    mirror: MirrorCheck,
    plan: MovePlan,
    report: MoveReport,
    operation: Operation,
    resources: Resources,
    place: Place,
    prediction: PredictionView,
    drained: DrainReport,
    host: HostView,
    ap: ApView,
    roam: RoamRequest,
    roamed: RoamReply,
    ready: Ready,
    event: Event,
}

impl Samples {
    fn new() -> Self {
        // Names and addresses that are known to be well-formed.
        fn host(name: &str) -> kage_machine::HostName {
            name.parse().unwrap_or_else(|_| unreachable!("a constant"))
        }
        let user: kage_machine::UserName = "alice".parse().unwrap_or_else(|_| unreachable!("a constant"));
        let ap: kage_machine::identity::ApName =
            "ap-1".parse().unwrap_or_else(|_| unreachable!("a constant"));
        let address = std::net::Ipv6Addr::new(0xfd4b, 0x6167, 0x6500, 0, 0, 0x700, 0, 1);
        let within = |kind: u16, index| {
            std::net::Ipv6Addr::new(0xfd4b, 0x6167, 0x6500, 0, 0, 0x700 | kind << 4, 0, index)
        };
        let advertise = std::net::SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xa], 7701));
        let term = kage_machine::Term(4);
        let report = MoveReport {
            user: user.clone(),
            from: host("h1"),
            to: host("h2"),
            mode: "precopy".into(),
            outcome: MoveOutcome::HandedOver,
            reason: None,
            term,
            total_ms: 180.5,
            blackout_ms: 1.9,
            gap_ms: 2.2,
            stall_ms: 1.9,
            clock_error_us: 60,
            rounds: 3,
            pages_sent: 5000,
            pages_at_switch: 40,
            bytes_wire: 7_000_000,
            bytes_raw: 20_480_000,
            faults: 0,
            fault_wait_ms: 0.5,
            forwarded_frames: 0,
            reordered_frames: 0,
            lost_frames: 0,
            lost_pages: 0,
            disk_pages_sent: 120,
            disk_bytes_sent: 480_000,
            disk_pages_elsewhere: 0,
            disk_pages_held: 25_000,
            replica_hit: ReplicaHit::None,
            phases: vec![PhaseView { name: "copy".into(), ms: 170.5, bytes: 6_900_000 }],
            blackout_phases: vec![PhaseView { name: "cross".into(), ms: 0.7, bytes: 2_300 }],
        };
        let drained = DrainReport {
            host: host("h1"),
            cordoned: true,
            cancelled: false,
            moved: 1,
            stay: 0,
            total_ms: 4210.5,
            worst_blackout_ms: 1.9,
            worst_gap_ms: 2.2,
            bytes_wire: 7_000_000,
            images: vec![DrainedImage {
                user: user.clone(),
                to: Some(host("h2")),
                outcome: "handed_over".into(),
                reason: None,
                tries: 1,
                report: Some(report.clone()),
            }],
            stopped: vec![user.clone()],
        };
        Self {
            drained,
            image: ImageView {
                user: user.clone(),
                vid: address,
                address,
                ipv4: Some(std::net::Ipv4Addr::new(10, 77, 0, 5)),
                host_key: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
                    .into(),
                host: host("h1"),
                term,
                state: State::Running,
                memory_bytes: 64 << 20,
                disk: Some(DiskView {
                    bytes: 1 << 30,
                    held_bytes: Some(120 << 20),
                    missing_bytes: Some(8 << 20),
                    pulled_bytes: 40 << 20,
                    origin: Some(host("h3")),
                }),
                dirty_bytes: 0,
                replicas: vec![Replica {
                    host: host("h2"),
                    kind: ReplicaKind::Mirror,
                    watermark: None,
                    lag_ms: 12.5,
                    missing_bytes: 4096,
                    handover_ms: 1.2,
                    handover_bytes: 20_480,
                }],
                pid: Some(4711),
                operation: None,
                note: None,
            },
            login: LoginReply {
                user: user.clone(),
                vid: address,
                address,
                ipv4: Some(std::net::Ipv4Addr::new(10, 77, 0, 5)),
                host: host("h1"),
                state: State::Running,
                started_ms: 7.5,
                found: false,
                disk_missing_bytes: 1 << 30,
                disk_pulled_bytes: 96 << 10,
                note: None,
            },
            mirror: MirrorCheck {
                host: host("h2"),
                epoch: kage_machine::Epoch(17),
                owner_digest: "0f".repeat(16),
                mirror_digest: "0f".repeat(16),
                mirror_epoch: kage_machine::Epoch(16),
                scrubbed_wrong_pages: 0,
            },
            plan: MovePlan {
                user: user.clone(),
                from: host("h1"),
                to: host("h2"),
                mode: "precopy".into(),
                reachable: true,
                pages: 5000,
                bytes_raw: 20_480_000,
                replica_hit: ReplicaHit::None,
                pages_to_send: 5200,
                pages_at_switch: 12,
                rounds: 3,
                bytes_wire: 6_900_000,
                total_ms: 1120.5,
                blackout_ms: 2.5,
                converges: true,
                reason: None,
                dirty_pages_per_s: 180.5,
                working_set_pages: 900.5,
                bytes_per_page: 1320.5,
                bytes_per_s: 6_250_000.5,
                rtt_ms: 0.5,
                assumed: vec!["bytes_per_s".into()],
                dry_run: true,
            },
            operation: Operation {
                id: "h1:7".into(),
                kind: "migrate".into(),
                user: Some(user.clone()),
                state: OperationState::Running,
                progress: json!({
                    "phase": "copy", "round": 2, "pages_done": 300, "pages_total": 1200, "bytes_wire": 3_400_000,
                    "bytes_per_s": 6_100_000, "dirty_pages": 1200, "elapsed_ms": 560, "eta_ms": 240,
                }),
                result: None,
                error: None,
            },
            report,
            resources: Resources {
                user: user.clone(),
                host: host("h1"),
                term,
                processes: vec![ProcessView {
                    vid: within(1, 9),
                    name: "sqlite".into(),
                    state: "waiting".into(),
                    pid: 3,
                    cpu_ms: 120,
                    memory_bytes: 4 << 20,
                }],
                files: vec![FileView {
                    vid: within(2, 6),
                    name: "motd".into(),
                    state: "file".into(),
                    path: "/etc/motd".into(),
                    bytes: 75,
                    replicas: vec![host("h2")],
                }],
                sockets: vec![SocketView {
                    vid: within(3, 14),
                    name: "tcp/22".into(),
                    state: "established".into(),
                    protocol: "tcp".into(),
                    local: "[fd4b:6167:6500::700:0:1]:22".into(),
                    remote: Some("[fd4b:6167:6500:ffff::1]:40312".into()),
                    bytes_in: 2048,
                    bytes_out: 4096,
                }],
                omitted: 0,
            },
            place: Place {
                vid: within(2, 6),
                kind: kage_machine::identity::Kind::File,
                name: "/etc/motd".into(),
                user: user.clone(),
                host: host("h1"),
                term,
            },
            prediction: PredictionView {
                user: user.clone(),
                at: Some(ap.clone()),
                next: vec![NextView { ap: ap.clone(), host: host("h2"), probability: 0.75 }],
                hosts: vec![HostChance { host: host("h2"), probability: 0.75 }],
                left_s: Some(40.5),
                window: 100,
                hit1: 0.75,
                hit3: 0.95,
            },
            host: HostView {
                name: host("h1"),
                advertise,
                up: true,
                cordoned: false,
                images: 1,
                aps: vec![ap.clone()],
            },
            ap: ApView {
                id: ap.clone(),
                nas: "ap-1".into(),
                host: host("h1"),
                position_m: [40.5, 12.5],
                mobility: "route".into(),
            },
            roam: RoamRequest {
                user: user.clone(),
                ap: ap.clone(),
                device: None,
                wait: false,
                age_ms: 0,
                at_ms: None,
            },
            roamed: RoamReply {
                user: user.clone(),
                ap,
                host: host("h2"),
                action: RoamAction::Moves,
                operation: Some("h1:7".into()),
                report: None,
            },
            ready: Ready {
                host: host("h1"),
                ready: true,
                lacks: vec!["directory unreachable".into()],
                warm_logins: 2,
                warm_shells: 2,
                memory_available_bytes: Some(3 << 30),
            },
            event: Event {
                id: 12,
                at_ms: 1_700_000_000_000,
                host: host("h1"),
                kind: "handed_over".into(),
                user: Some(user),
                details: Map::new(),
            },
        }
    }
}
