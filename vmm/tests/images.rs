//! Machines of images: programs of the default one at work, files, services, limits.

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use kage_images::{ImageFile, assemble};
use lab::{Lab, desk::Desk};

/// Runs a command line with some input; returns its output.
fn feed(desk: &Desk<'_>, line: &str, input: &str) -> String {
    let mut child = desk
        .ssh(&[])
        .args(["--", line])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("ssh is installed");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Connects to a port of the machine once something listens there.
fn connect(desk: &Desk<'_>, port: u16) -> TcpStream {
    let start = Instant::now();
    loop {
        match TcpStream::connect((desk.lab.address(), port)) {
            Ok(stream) => return stream,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(20), "port {port}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A connection to `kv` that sends a line and reads one.
struct Kv(BufReader<TcpStream>);

impl Kv {
    fn open(desk: &Desk<'_>, port: u16) -> Self {
        let stream = connect(desk, port);
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(BufReader::new(stream))
    }

    fn ask(&mut self, line: &str) -> String {
        self.0.get_mut().write_all(format!("{line}\r\n").as_bytes()).unwrap();
        let mut reply = String::new();
        self.0.read_line(&mut reply).unwrap();
        if reply.starts_with('$') && reply != "$-1\r\n" {
            reply.clear();
            self.0.read_line(&mut reply).unwrap();
        }
        reply.trim_end().to_owned()
    }
}

#[test]
fn sql_is_right_before_during_and_after_moves() {
    Lab::run(|lab| {
        let mut desk = Desk::new(lab);
        let sql = "create table t(n integer primary key, s text);\n\
                   insert into t with recursive c(n) as (select 1 union all select n + 1 from c where n < 2000)\n\
                   select n, printf('row %d', n) from c;\n\
                   select count(*), sum(n), max(s) from t;\n";
        assert_eq!(feed(&desk, "sqlite3 data.db", sql), "2000|2001000|row 999\n");
        for round in 1..=5 {
            // One query runs while the machine moves.
            let query = "sqlite3 data.db 'select count(*) from t a, t b where a.n <> b.n and a.n < 400'";
            let running = desk.ssh(&[]).args(["--", query]).stdout(Stdio::piped()).spawn().unwrap();
            desk.walk();
            let output = running.wait_with_output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), "797601\n", "move {round}: {output:?}");
            let line = format!(
                "sqlite3 data.db 'update t set s = s || {round} where n = 7; select s from t where n = 7'"
            );
            let marks: String = (1..=round).map(|round| round.to_string()).collect();
            assert_eq!(desk.say(&line), format!("row 7{marks}\n"));
        }
        assert_eq!(desk.say("sqlite3 data.db 'pragma integrity_check'"), "ok\n");
    });
}

#[test]
fn scripts_run_from_files_and_line_by_line() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        assert_eq!(desk.say("js -e '[3,1,2].sort().map(x => x * x).join()'"), "1,4,9\n");
        let script = "import * as std from 'std';\nlet s = 0;\nfor (let i = 0; i < 1e5; i++) s += i;\n\
                      console.log(scriptArgs[1], s, std.getenv('HOME'));\n";
        feed(&desk, "cat > sum.mjs", script);
        assert_eq!(desk.say("js sum.mjs total"), "total 4999950000 /home/alice\n");
        assert_ne!(desk.exec("js -e 'throw new Error(1)'").status.code(), Some(0));
        let said = feed(&desk, "js", "let a = { b: [1, 'x'] }\na\n(1 +\n2)\nnope\n");
        for wanted in ["{ b: [ 1, \"x\" ] }", "\n3\n", "ReferenceError"] {
            let said = said.replace("> ", "").replace("… ", "");
            assert!(said.contains(wanted.trim_start()), "{wanted}: {said}");
        }
    });
}

#[test]
fn file_tools_do_what_their_names_say() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        feed(&desk, "cat > words", "pear\napple\nfig\napple\nplum 12\n");
        for (line, wanted) in [
            ("sort words | uniq -c | sort -rn | head -n 1", "      2 apple\n"),
            ("grep -n '^p' words", "1:pear\n5:plum 12\n"),
            ("grep -c apple words", "2\n"),
            ("wc -l words", "       5 words\n"),
            ("tail -n 2 words", "apple\nplum 12\n"),
            ("cut -d ' ' -f 2 words | tail -n 1", "12\n"),
            ("tr a-z A-Z < words | head -n 1", "PEAR\n"),
            ("sed -n 's/\\(p\\)lum/\\1each/p' words", "peach 12\n"),
            ("seq 3 | tac", "3\n2\n1\n"),
            ("sha256sum words | cut -c 1-8", "ad1ea7d2\n"),
            ("xxd -l 4 words", "00000000: 7065 6172                                pear\n"),
            ("find . -name 'w*'", "./words\n"),
        ] {
            if line.starts_with("sha256sum") {
                assert_eq!(desk.say(line).len(), wanted.len());
                continue;
            }
            assert_eq!(desk.say(line), wanted, "{line}");
        }
        assert_eq!(desk.exec("grep nothing words").status.code(), Some(1));
        assert_eq!(desk.say("cp words w2; mv w2 w3; cmp words w3; echo $?"), "0\n");
    });
}

#[test]
fn a_key_value_service_keeps_its_connections_over_moves() {
    Lab::run(|lab| {
        let mut desk = Desk::new(lab);
        let mut session =
            desk.ssh(&["-tt"]).args(["--", "kv --log kv.log"]).stdin(Stdio::piped()).spawn().unwrap();
        let mut kv = Kv::open(&desk, 6379);
        assert_eq!(kv.ask("SET a 1"), "+OK");
        for round in 2..=4 {
            desk.walk();
            assert_eq!(kv.ask("INCR a"), format!(":{round}"));
        }
        assert_eq!(kv.ask("GET a"), "4");
        assert_eq!(kv.ask("GET b"), "$-1");
        session.kill().unwrap();
        session.wait().unwrap();
    });
}

#[test]
fn a_directory_is_served() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        desk.say("mkdir site");
        feed(&desk, "cat > site/index.html", "<p>hello\n");
        let mut session =
            desk.ssh(&["-tt"]).args(["--", "httpd site"]).stdin(Stdio::piped()).spawn().unwrap();
        drop(connect(&desk, 8080));
        let get = |path: &str| {
            let url = format!("http://[{}]:8080{path}", desk.lab.address());
            let output =
                std::process::Command::new("curl").args(["-sSg", "-m", "20", "-r", "0-5", &url]).output();
            String::from_utf8(output.unwrap().stdout).unwrap()
        };
        assert_eq!(get("/"), "<p>hel");
        assert_eq!(get("/none"), "404 Not Found\n");
        session.kill().unwrap();
        session.wait().unwrap();
    });
}

/// A directory with an image's manifest and a file, removed in the end.
struct Source(PathBuf);

impl Source {
    fn new(manifest: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kage-image-{}", std::process::id()));
        fs::create_dir_all(path.join("files/etc/inner")).unwrap();
        fs::write(path.join("image.toml"), manifest).unwrap();
        fs::write(path.join("files/etc/inner/greeting"), "hello from the image\n").unwrap();
        Self(path)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn own_image() -> ImageFile {
    let source = Source::new(
        "name = 'own'\nfiles = 'files'\n[[program]]\nname = 'kv'\n[[program]]\nname = 'tools'\naliases = ['seq']\n\
         [[service]]\nname = 'store'\nprogram = 'kv'\narguments = ['--port', '7000']\nrestart = 'always'\n\
         [[service]]\nname = 'once'\nprogram = 'seq'\narguments = ['2']\nrestart = 'never'\n\
         [limits]\nprocesses = 3\nprocess_memory = '8MiB'",
    );
    assemble(source.path()).unwrap()
}

#[test]
fn an_image_has_its_own_files_programs_and_services() {
    Lab::run_with(own_image(), |lab| {
        let mut desk = Desk::new(lab);
        assert_eq!(desk.say("cat /etc/inner/greeting"), "hello from the image\n");
        assert_eq!(desk.say("echo mine > /etc/inner/greeting; cat /etc/inner/greeting"), "mine\n");
        assert_eq!(desk.say("seq 2"), "1\n2\n");
        assert_ne!(desk.exec("sqlite3 :memory: ''").status.code(), Some(0), "the image has none");
        let mut kv = Kv::open(&desk, 7000);
        assert_eq!(kv.ask("SET a b"), "+OK");
        // A service that is killed starts again.
        let ps = desk.say("ps");
        let pid = ps.lines().find(|line| line.contains("kv")).and_then(|line| line.split_whitespace().next());
        desk.say(&format!("kill {}", pid.expect("the service runs")));
        let start = Instant::now();
        while Kv::open(&desk, 7000).ask("GET a") != "$-1" {
            assert!(start.elapsed() < Duration::from_secs(20));
        }
        let log = lab.logs(desk.machine());
        for wanted in ["once: 2", "service once: exit 0", "service store: killed by TERM, starts again"] {
            assert!(log.contains(wanted), "{wanted}: {log}");
        }
    });
}
