//! A testbed's site: authority, certificates, secret, and one `host.toml` per host.

use std::{fmt::Write, fs};

use kage_host::{config::Config, init};

use super::{
    TestbedError, TestbedSpec,
    layout::{HostLayout, IPV4_POOL, Layout, PREFIX, RADIUS_PORT},
};

/// Writes everything daemons read at start.
pub fn write(layout: &Layout, spec: &TestbedSpec) -> Result<(), TestbedError> {
    let hosts: Vec<_> =
        layout.hosts.iter().map(|host| init::HostSpec { name: host.name.clone(), advertise: None }).collect();
    let site = init::site(&layout.site(), &hosts)?;
    let image_key = fs::read_to_string(site.image_public())
        .map_err(|source| TestbedError::File { path: site.image_public(), source })?;
    for host in &layout.hosts {
        let path = layout.config(&host.name);
        let text = config(layout, spec, host, image_key.trim())?;
        Config::parse(&path, &text)?;
        for dir in [
            layout.host_dir(&host.name),
            layout.run_dir(&host.name),
            layout.host_dir(&host.name).join("state"),
        ] {
            fs::create_dir_all(&dir).map_err(|source| TestbedError::File { path: dir, source })?;
        }
        fs::write(&path, text).map_err(|source| TestbedError::File { path, source })?;
    }
    Ok(())
}

/// The secret that access points share with daemons.
pub fn secret(layout: &Layout) -> Result<String, TestbedError> {
    let path = layout.site().join("radius.secret");
    fs::read_to_string(&path)
        .map(|text| text.trim().to_owned())
        .map_err(|source| TestbedError::File { path, source })
}

fn config(
    layout: &Layout,
    spec: &TestbedSpec,
    host: &HostLayout,
    image_key: &str,
) -> Result<String, TestbedError> {
    let first = layout.hosts.first().ok_or(TestbedError::NoHosts)?;
    let (name, site, dir) = (&host.name, layout.site(), layout.host_dir(&host.name));
    let memory = spec.image_memory.map(|size| format!("memory = \"{size}\"\n")).unwrap_or_default();
    let grace = spec.logout_grace.map(|grace| format!("logout_grace = \"{grace}\"\n")).unwrap_or_default();
    let followers =
        spec.followers.map(|count| format!("\n[replicate]\nfollowers = {count}\n")).unwrap_or_default();
    let ipv4 = if spec.ipv4 { format!("ipv4 = \"{IPV4_POOL}\"\n") } else { String::new() };
    let mut text = format!(
        r#"[host]
name = "{name}"
state_dir = "{dir}/state"
run_dir = "{dir}/run"

[peer]
listen = "{advertise}"
advertise = "{advertise}"
tls_dir = "{site}/{name}/tls"

[cluster]
directory = "embedded"
endpoints = ["{first}"]

[network]
prefix = "{PREFIX}"
underlay = "eth0"
{ipv4}
[image]
{memory}operator_key_file = "{site}/operator.pub"
trusted_keys = ["{image_key}"]
{followers}
[roam.radius]
listen = "[::]:{RADIUS_PORT}"
{grace}
[[roam.radius.client]]
from = "::/0"
secret_file = "{site}/radius.secret"

[[roam.radius.client]]
from = "0.0.0.0/0"
secret_file = "{site}/radius.secret"
"#,
        dir = dir.display(),
        site = site.display(),
        advertise = host.advertise(),
        first = first.advertise(),
    );
    for near in &layout.hosts {
        let (ap, host, [x, y]) = (&near.ap, &near.name, near.position_m());
        let _ = write!(
            text,
            "\n[[ap]]\nid = \"{ap}\"\nnas = \"{ap}\"\nhost = \"{host}\"\nposition_m = [{x:.1}, {y:.1}]\n\
             mobility = \"route\"\n"
        );
    }
    Ok(text)
}
