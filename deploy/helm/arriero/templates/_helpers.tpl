{{- define "arriero.name" -}}
{{- printf "%s" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "arriero.labels" -}}
app.kubernetes.io/name: arriero
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Labels that select the pods of a program: a dictionary with `root` and `program`. */}}
{{- define "arriero.selector" -}}
app.kubernetes.io/name: arriero
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .program }}
{{- end -}}

{{- define "arriero.secretName" -}}
{{- required "secret.name: an existing Secret with the URLs of Postgres and Valkey is needed" .Values.secret.name -}}
{{- end -}}

{{- define "arriero.image" -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default (printf "%s-cpu" .Chart.AppVersion)) -}}
{{- end -}}

{{/* Variables of every program. */}}
{{- define "arriero.environment" -}}
- {name: ARRIERO_DATABASE_URL_FILE, value: /run/secrets/arriero/database_url}
- {name: ARRIERO_REDIS_URL_FILE, value: /run/secrets/arriero/redis_url}
- {name: ARRIERO_DATA_DIR, value: /var/lib/arriero}
- {name: ARRIERO_LOG__FORMAT, value: json}
{{- if .Values.stepSecrets }}
- {name: ARRIERO_SECRETS_DIR, value: /run/secrets/steps}
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{- define "arriero.mounts" -}}
- {name: urls, mountPath: /run/secrets/arriero, readOnly: true}
- {name: data, mountPath: /var/lib/arriero}
- {name: temporary, mountPath: /tmp}
{{- if .Values.stepSecrets }}
- {name: steps, mountPath: /run/secrets/steps, readOnly: true}
{{- end }}
{{- if .Values.models.existingClaim }}
- {name: models, mountPath: /var/lib/arriero/models}
{{- end }}
{{- end -}}

{{/* Volumes beside that of the data. */}}
{{- define "arriero.volumes" -}}
- name: urls
  secret:
    secretName: {{ include "arriero.secretName" . }}
    defaultMode: 0440
    items:
      - {key: {{ .Values.secret.databaseUrlKey }}, path: database_url}
      - {key: {{ .Values.secret.redisUrlKey }}, path: redis_url}
- name: temporary
  emptyDir: {sizeLimit: 1Gi}
{{- if .Values.stepSecrets }}
- name: steps
  secret: {secretName: {{ .Values.stepSecrets }}, defaultMode: 0440}
{{- end }}
{{- if .Values.models.existingClaim }}
- name: models
  persistentVolumeClaim: {claimName: {{ .Values.models.existingClaim }}}
{{- end }}
{{- end -}}

{{- define "arriero.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "arriero.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Replicas on different nodes, where that is possible: a dictionary with `root` and `program`. */}}
{{- define "arriero.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "arriero.selector" . | nindent 6 }}
{{- end -}}
