-- KEYS: one with the prefix of the records. ARGV: 'replicated' or '', 'cluster' or ''. Returns the commands that this user may not run;
-- fails like the other scripts on a read-only replica. Changes nothing.
local key, missing = KEYS[1], {}
local function need(name, ...)
  -- Servers that only resemble Redis may lack the function; then the first operation reports a missing right.
  if not redis.acl_check_cmd then return end
  -- Raises an error where the server does not know the command, such as a renamed one.
  local is_known, is_allowed = pcall(redis.acl_check_cmd, name, ...)
  if not (is_known and is_allowed) then table.insert(missing, name) end
end
need('evalsha', '', '1', key)
need('get', key)
need('set', key, '', 'PXAT', '1')
need('del', key)
need('pexpireat', key, '1')
need('time')
if ARGV[1] ~= '' then need('wait', '1', '1') end
if ARGV[2] ~= '' then need('asking') end
local tried = redis.pcall('PEXPIREAT', key, 1, 'GT')
if type(tried) == 'table' and string.find(tried.err, 'READONLY', 1, true) then return tried end
return missing
