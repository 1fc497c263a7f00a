//! Access points and servers as sites have them, from whose accounting Kage learns where users are: radclient,
//! FreeRADIUS, and hostapd with wpa_supplicant.

use std::{
    fs,
    io::Write as _,
    net::UdpSocket,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
};

use kage_tests::{Site, lines, text};

/// What the relay shares with the access points.
const RELAY_SECRET: &str = "between access points and relay";
/// Where the relay takes accounting.
const RELAY: &str = "127.0.0.1:18130";
/// Where a host's daemon takes it.
const DAEMON: &str = "[::1]:1813";

/// Two hosts with an access point each, and little patience with those who left.
fn site() -> Site {
    Site::with(|spec| {
        (spec.hosts, spec.devices) = (2, 1);
        spec.logout_grace = "1s".parse().ok();
    })
}

/// A program that runs until this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn secret(site: &Site) -> String {
    site.status().unwrap().radius.secret
}

/// Sends a request with these attributes from a host's network, as radclient does it.
fn radclient(site: &Site, host: &str, server: &str, secret: &str, attributes: &str) -> Output {
    let mut command = Command::new("radclient");
    command.args(["-x", "-r", "2", "-t", "3", server, "acct", secret]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = site
        .spawn(host, &mut command)
        .unwrap_or_else(|error| panic!("radclient: {error}; scripts/setup installs freeradius-utils"));
    writeln!(child.stdin.take().unwrap(), "{attributes}").unwrap();
    child.wait_with_output().unwrap()
}

/// A report that the daemon of `host` has to answer.
fn report(site: &Site, host: &str, status: &str, user: &str, ap: &str, more: &str) {
    let output = radclient(site, host, DAEMON, &secret(site), &attributes(status, user, ap, more));
    assert!(output.status.success(), "{status} at {ap}: {}{}", said(&output), site.daemon_logs());
}

fn attributes(status: &str, user: &str, ap: &str, more: &str) -> String {
    format!(
        "User-Name={user},Acct-Status-Type={status},NAS-Identifier={ap},Acct-Session-Id={ap}-1,\
         Calling-Station-Id=02-00-00-00-00-01{more}"
    )
}

fn said(output: &Output) -> String {
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{out}{errors}")
}

fn wait(site: &Site, user: &str, arguments: &[&str]) {
    let mut all = vec!["wait", user, "--timeout", "20s", "--state"];
    all.extend(arguments);
    let output = site.kage("h1", &all);
    assert!(output.status.success(), "{arguments:?}: {}{}", said(&output), site.daemon_logs());
}

/// Writes a file of the test and returns its path.
fn file(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, content).unwrap();
    path
}

/// Starts a program that prints what it does, and waits for a line with these words.
fn until(site: &Site, name: &str, command: &mut Command, words: &str) -> Running {
    let mut running = Running(site.start(name, command));
    let (mut said, mut seen) = (lines(&mut running.0), Vec::new());
    while let Some(line) = said.next() {
        if line.contains(words) {
            // Nobody listening any more would be the end of it.
            thread::spawn(move || said.for_each(drop));
            return running;
        }
        seen.push(line);
    }
    panic!("{command:?} ended without {words:?}:\n{}", seen.join("\n"));
}

#[test]
fn accounting_by_radclient_logs_in_moves_and_logs_out() {
    let site = site();
    let user = "carol@example.org";
    let device = ",Framed-IPv6-Address=fd4b:6167:65ff::99";
    // A stranger to the configuration: the first use of an identity makes its machine.
    report(&site, "h1", "Start", user, "ap-1", device);
    wait(&site, user, &["running", "--at", "h1"]);
    report(&site, "h2", "Start", user, "ap-2", device);
    wait(&site, user, &["running", "--at", "h2"]);
    let mut routes = Command::new("ip");
    let routes = site.output("h2", routes.args(["-6", "route", "show", "fd4b:6167:65ff::99"])).unwrap();
    assert!(said(&routes).contains("dev kb-ap-2"), "{}", said(&routes));

    // What was reported long ago moves nobody back, and the old access point's Stop ends nothing.
    report(&site, "h1", "Start", user, "ap-1", ",Event-Timestamp=1700000000");
    report(&site, "h1", "Stop", user, "ap-1", "");
    let wrong = radclient(&site, "h1", DAEMON, "another secret", &attributes("Start", user, "ap-1", ""));
    assert!(!wrong.status.success(), "a wrong secret was answered: {}", said(&wrong));
    wait(&site, user, &["running", "--at", "h2"]);

    report(&site, "h2", "Stop", user, "ap-2", "");
    wait(&site, user, &["stopped"]);
    assert_eq!(text(&site.show(user), "host"), "h2");
}

/// FreeRADIUS's configuration of a server that does this.
fn freeradius(dir: &Path, modules: &str, server: &str) -> String {
    let dir = dir.display();
    format!(
        r#"prefix = /usr
libdir = /usr/lib/freeradius
raddbdir = {dir}
logdir = {dir}
run_dir = {dir}
thread pool {{
    start_servers = 1
    max_servers = 2
    min_spare_servers = 1
    max_spare_servers = 1
    max_requests_per_server = 0
}}
modules {{
    {modules}
}}
client access-points {{
    ipaddr = 127.0.0.0/8
    secret = "{RELAY_SECRET}"
}}
{server}
"#
    )
}

/// Its part that hands all accounting on to this host's daemon.
fn relay(secret: &str) -> String {
    format!(
        r#"home_server kage {{
    type = acct
    ipv6addr = ::1
    port = 1813
    secret = {secret}
    response_window = 6
    status_check = none
}}
home_server_pool kage {{
    type = fail-over
    home_server = kage
}}
realm kage {{
    acct_pool = kage
    nostrip
}}
server relay {{
    listen {{
        type = acct
        ipaddr = 127.0.0.1
        port = 18130
    }}
    preacct {{
        update control {{
            &Proxy-To-Realm := "kage"
        }}
    }}
    accounting {{
        ok
    }}
}}"#
    )
}

/// Its part that knows alice by her password.
const AUTHENTICATION: &str = r#"server authentication {
    listen {
        type = auth
        ipaddr = 127.0.0.1
        port = 18120
    }
    authorize {
        if (&User-Name == "alice") {
            update control {
                &Cleartext-Password := "correct horse"
            }
        }
        eap
    }
    authenticate {
        eap
    }
}"#;

#[test]
fn accounting_that_freeradius_relays_has_the_same_effect() {
    let site = site();
    let dir = site.dir().join("freeradius");
    fs::create_dir(&dir).unwrap();
    let modules = "always ok {\nrcode = ok\n}";
    file(&dir, "radiusd.conf", &freeradius(&dir, modules, &relay(&secret(&site))));
    let mut server = Command::new("freeradius");
    server.args(["-f", "-l", "stdout", "-d"]).arg(&dir);
    let _relay = until(&site, "h1", &mut server, "Ready to process requests");

    let send = |status, ap| {
        let attributes = attributes(status, "dave", ap, ",Proxy-State=0x0102fe");
        let output = radclient(&site, "h1", RELAY, RELAY_SECRET, &attributes);
        assert!(output.status.success(), "{status} at {ap}: {}{}", said(&output), site.daemon_logs());
        // radclient prints what it sent and what came back.
        let states = said(&output).matches("Proxy-State = 0x0102fe").count();
        assert_eq!(states, 2, "Proxy-State came back changed: {}", said(&output));
    };
    send("Start", "ap-1");
    wait(&site, "dave", &["running", "--at", "h1"]);
    // One daemon may hear of all access points; others' machines are theirs to move and to stop.
    send("Start", "ap-2");
    wait(&site, "dave", &["running", "--at", "h2"]);
    send("Stop", "ap-2");
    wait(&site, "dave", &["stopped"]);
}

/// hostapd's configuration for a wired port: it asks a server beside it who the user is, and reports to this host's
/// daemon.
fn access_point(port: &str, ap: &str, secret: &str) -> String {
    format!(
        "interface={port}\ndriver=wired\nlogger_stdout=-1\nlogger_stdout_level=1\n\
         ieee8021x=1\nuse_pae_group_addr=1\nnas_identifier={ap}\nown_ip_addr=127.0.0.1\n\
         auth_server_addr=127.0.0.1\nauth_server_port=18120\nauth_server_shared_secret={RELAY_SECRET}\n\
         acct_server_addr=::1\nacct_server_port=1813\nacct_server_shared_secret={secret}\n\
         radius_acct_interim_interval=60\n"
    )
}

#[test]
fn authentication_at_an_access_point_starts_the_machine_and_at_another_moves_it() {
    let site = site();
    let dir = site.dir();
    let servers = dir.join("freeradius");
    fs::create_dir(&servers).unwrap();
    let modules = "eap {\ndefault_eap_type = md5\nmd5 {\n}\n}";
    file(&servers, "radiusd.conf", &freeradius(&servers, modules, AUTHENTICATION));
    let supplicant = file(
        dir,
        "supplicant",
        "ap_scan=0\nnetwork={\n key_mgmt=IEEE8021X\n eap=MD5\n identity=\"alice\"\n \
         password=\"correct horse\"\n eapol_flags=0\n}\n",
    );
    let secret = secret(&site);
    let authenticate = |host: &str, ap: &str, link: u8| {
        let mut server = Command::new("freeradius");
        server.args(["-f", "-l", "stdout", "-d"]).arg(&servers);
        let server = until(&site, host, &mut server, "Ready to process requests");
        let config = file(dir, &format!("{ap}.conf"), &access_point(&format!("d1w{link}"), ap, &secret));
        let mut hostapd = Command::new("hostapd");
        let hostapd = until(&site, host, hostapd.arg(config), "AP-ENABLED");
        let mut client = Command::new("wpa_supplicant");
        client.args(["-D", "wired", "-i", &format!("wlan{link}"), "-c"]).arg(&supplicant);
        let client = until(&site, "d1", &mut client, "CTRL-EVENT-EAP-SUCCESS");
        wait(&site, "alice", &["running", "--at", host]);
        (server, hostapd, client)
    };
    let _first = authenticate("h1", "ap-1", 0);
    // The device's cable is carried over; nobody but the new access point says so.
    let moved = site.move_device("d1", "ap-2", true).unwrap();
    assert_eq!(moved.host, "h2");
    let _second = authenticate("h2", "ap-2", 1);
}

#[test]
fn what_a_network_does_to_accounting_neither_ends_a_daemon_nor_moves_a_machine() {
    let site = site();
    report(&site, "h1", "Start", "erin", "ap-1", "");
    wait(&site, "erin", &["running", "--at", "h1"]);
    let socket = site.within("h1", || UdpSocket::bind("[::1]:0")).unwrap().unwrap();
    socket.connect(DAEMON).unwrap();
    // Ten thousand datagrams of a seeded generator, half of which begin as requests do.
    let mut state = 7_u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    for number in 0..10_000_u16 {
        let mut bytes: Vec<u8> = (0..=next()).map(|_| next()).collect();
        if number % 2 == 0 && bytes.len() >= 20 {
            let length = bytes.len() as u8;
            bytes[..4].copy_from_slice(&[4, 1, 0, length]);
        }
        // A full buffer at the other end drops, as networks do.
        let _ = socket.send(&bytes);
    }
    report(&site, "h1", "Interim-Update", "erin", "ap-1", "");
    wait(&site, "erin", &["running", "--at", "h1"]);
    let log = fs::read_to_string(site.dir().join("h1/log")).unwrap();
    let lines = log.lines().filter(|line| line.contains("wrong authenticator")).count();
    assert!((1..20).contains(&lines), "{lines} lines of 10,000 datagrams");
}
