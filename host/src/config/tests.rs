use super::*;

const SAMPLE: &str = r#"[host]
name = "edge-a"
run_dir = "/run/kage"
[peer]
advertise = "[2001:db8::a]:7701"
[cluster]
endpoints = ["[2001:db8::a]:7701"]
[network]
prefix = "fd4b:6167:6500::/48"
underlay = "eth0"
[image]
memory = "64MiB"
[[user]]
identity = "alice@example.org"
image = "alice"
[migrate]
blackout = "10ms"
[replicate]
max_rate = "50mbit"
[roam.radius]
logout_grace = "120s"
[[roam.radius.client]]
from = "10.0.0.0/8"
secret_file = "/etc/kage/radius.secret"
[[ap]]
id = "ap-17"
nas = "edge-b.ap17"
host = "edge-b"
position_m = [40, 12]
mobility = "route"
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("host.toml"), text)
}

fn refusal(from: &str, to: &str) -> String {
    assert!(SAMPLE.contains(from), "{from} is not in the sample");
    parse(&SAMPLE.replacen(from, to, 1)).unwrap_err().to_string()
}

#[test]
fn the_sample_is_read() {
    let config = parse(SAMPLE).unwrap();
    assert_eq!(config.host.name.as_str(), "edge-a");
    assert_eq!(config.image.geometry().unwrap().memory_pages, 16384);
    assert_eq!(config.replicate.max_rate, Some(Rate(50_000_000)));
    assert_eq!(config.aps[0].nas(), "edge-b.ap17");
    assert!(config.serves_directory());
    assert!(config.radius.unwrap().clients[0].from.contains("10.9.8.7".parse().unwrap()));
}

#[test]
fn an_endpoint_elsewhere_means_another_host_serves_the_directory() {
    let config = parse(
        &SAMPLE
            .replace("endpoints = [\"[2001:db8::a]:7701\"]", "endpoints = [\"https://[2001:db8::b]:7701\"]"),
    );
    assert!(!config.unwrap().serves_directory());
}

#[test]
fn what_cannot_be_meant_is_refused_with_file_line_and_cure() {
    for (from, to, line, says) in [
        ("run_dir =", "run_dri =", 3, "unknown field `run_dri`"),
        ("64MiB", "64", 12, "write it as 64MiB"),
        ("64MiB", "0B", 12, "choose between 16MiB and 2GiB"),
        ("64MiB", "1KiB", 12, "choose between 16MiB and 2GiB"),
        ("64MiB", "1TiB", 12, "choose between 16MiB and 2GiB"),
        ("/48", "/40", 9, "a site prefix is a /48"),
        ("fd4b:6167:6500::/48", "nonsense", 9, "write it as fd4b:6167:6500::/48"),
        ("\"10ms\"", "\"10\"", 17, "write it as 10ms"),
        ("\"10ms\"", "\"1h\"", 16, "make timeout longer"),
        ("\"10ms\"", "\"10ms\"\nmode = \"postcopy\"", 18, "not in this version"),
        ("50mbit", "50Mb", 19, "write it as 50mbit"),
        ("50mbit\"", "50mbit\"\nmodel = \"clever\"", 20, "expected `auto` or `off`; use one of those"),
        ("50mbit\"", "50mbit\"\nfollowers = 17", 20, "use at most 16"),
        ("[roam.radius]", "[roam]\ndwell = \"1h\"\n[roam.radius]", 21, "make dwell at most 5m"),
        ("10.0.0.0/8", "10.0.0.0/33", 23, "write it as 10.0.0.0/8"),
        ("\"edge-a\"", "\"edge a\"", 2, "host name"),
        ("[2001:db8::a]:7701\"\n[cl", "[::]:7701\"\n[cl", 5, "peers cannot connect"),
        (
            "[[user]]",
            "[[user]]\nidentity = \"alice@example.org\"\nimage = \"eve\"\n[[user]]",
            16,
            "is there twice",
        ),
        ("[[ap]]", "[[ap]]\nid = \"ap-17\"\nhost = \"edge-b\"\n[[ap]]", 28, "is there twice"),
        ("[roam.radius]", "[roam.radius]\nlisten = \"1813\"", 21, "invalid socket address"),
    ] {
        let text = refusal(from, to);
        assert!(text.starts_with(&format!("host.toml:{line}: ")), "{from} -> {to}: {text}");
        assert!(text.contains(says), "{from} -> {to}: {text}");
    }
}

#[test]
fn a_missing_table_names_the_field_and_the_sample() {
    let text = parse("[host]\nname = \"a\"\n").unwrap_err().to_string();
    assert!(text.contains("missing field") && text.contains("kage init"), "{text}");
}

#[test]
fn mapped_addresses_match_their_ipv4_network() {
    let subnet: Subnet = "10.0.0.0/8".parse().unwrap();
    assert!(subnet.contains("::ffff:10.1.2.3".parse().unwrap()));
    assert!(!subnet.contains("fd00::1".parse().unwrap()));
    let all: Subnet = "::/0".parse().unwrap();
    assert!(all.contains("fd00::1".parse().unwrap()));
}

#[test]
fn every_documented_key_is_known() {
    let text = r#"
[host]
name = "edge-a"
state_dir = "/var/lib/kage"
run_dir = "/run/kage"
[api]
listen = "[::1]:7700"
[peer]
listen = "[::]:7701"
advertise = "[2001:db8::a]:7701"
tls_dir = "/etc/kage/tls"
[cluster]
directory = "embedded"
endpoints = ["https://[2001:db8::a]:7701"]
lease = "5s"
on_partition = "pause"
[network]
prefix = "fd4b:6167:6500::/48"
underlay = "eth0"
forward_after_move = "5s"
[image]
default = "default"
memory = "64MiB"
cpu_baseline = "v3"
failover = "none"
disk_replicas = 2
operator_key_file = "/etc/kage/operator.pub"
[[user]]
identity = "alice@example.org"
image = "alice"
[migrate]
blackout = "10ms"
timeout = "30s"
mode = "auto"
[replicate]
followers = 2
max_rate = "50mbit"
max_memory = "256MiB"
model = "auto"
[roam]
dwell = "3s"
[roam.radius]
listen = "[::]:1813"
logout_grace = "120s"
[[roam.radius.client]]
from = "10.0.0.0/8"
secret_file = "/etc/kage/radius.secret"
[[ap]]
id = "ap-17"
nas = "edge-b.ap17"
host = "edge-b"
position_m = [40, 12]
mobility = "route"
[telemetry]
prometheus = "[::1]:9711"
otlp = ""
"#;
    assert!(parse(text).unwrap().serves_directory());
    let etcd = text.replace("directory = \"embedded\"", "directory = \"etcd\"");
    assert!(parse(&etcd).unwrap_err().to_string().contains("not in this version"));
}
